"""Train a network once and get a smaller one that computes the same function."""

from .checkpoint import inflate, load
from .groups import GroupList, Kind, ParamSlice, PruningGroup, Role, find_groups
from .oto import OTO
from .report import SubnetReport
from .subnet import Subnet
from .surgery import construct_subnet
from .trace import trace
from .verify import verify_subnet

__version__ = "0.1.0"

__all__ = [
    "OTO",
    "GroupList",
    "Kind",
    "ParamSlice",
    "PruningGroup",
    "Role",
    "Subnet",
    "SubnetReport",
    "construct_subnet",
    "find_groups",
    "inflate",
    "load",
    "trace",
    "verify_subnet",
]
