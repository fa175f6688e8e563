"""Methods that drive units to zero while an ordinary torch optimizer trains: one file each, attached by ``base``."""

from only_train_once.optim.base import METHODS, AttachedOptimizer, Metrics, attach
from only_train_once.optim.hesso import Hesso, build_hesso

__all__ = ["METHODS", "AttachedOptimizer", "Hesso", "Metrics", "attach", "build_hesso"]
