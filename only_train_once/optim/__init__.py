"""Methods that drive units to zero while an ordinary torch optimizer trains: one file each, attached by ``base``."""

from only_train_once.optim.base import AttachedOptimizer, Metrics, attach
from only_train_once.optim.build import build
from only_train_once.optim.hesso import Hesso
from only_train_once.optim.method import METHODS, Method, register_method

__all__ = ["METHODS", "AttachedOptimizer", "Hesso", "Method", "Metrics", "attach", "build", "register_method"]
