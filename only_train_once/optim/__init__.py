"""Methods that drive units to zero while an ordinary torch optimizer trains: one file each, attached by ``base``."""

from only_train_once.optim.ada_hspg import AdaHspg
from only_train_once.optim.base import AttachedOptimizer, Metrics, attach
from only_train_once.optim.build import build
from only_train_once.optim.dhspg import Dhspg
from only_train_once.optim.files import MethodState, expect
from only_train_once.optim.hesso import Hesso
from only_train_once.optim.hesso_cric import HessoCric
from only_train_once.optim.hspg import Hspg
from only_train_once.optim.method import METHODS, Method, register_method

__all__ = [
    "METHODS",
    "AdaHspg",
    "AttachedOptimizer",
    "Dhspg",
    "Hesso",
    "HessoCric",
    "Hspg",
    "Method",
    "MethodState",
    "Metrics",
    "attach",
    "build",
    "expect",
    "register_method",
]
