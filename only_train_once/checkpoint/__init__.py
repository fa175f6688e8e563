"""`save` a subnet, and `load` it: ``model.safetensors`` for the tensors, ``subnet.json`` for everything else.

    model.safetensors             parameters and buffers, or
    model-00001-of-0000N.safetensors ... and model.safetensors.index.json, as Hugging Face's libraries have them
    subnet.json                   versions, surgery record, report, how the model is made, checksums

All buffers are saved, also those that ``state_dict`` leaves out: what is loaded is what was saved, and a model
built on the meta device, which has no values at all, can be completed. ``tensor_files`` knows the first kind of file,
``manifest`` the second; ``writing`` and ``loading`` go through both, ``inflating`` back to the full size.
"""

from .inflating import inflate
from .loading import load
from .manifest import RECORD_FILE, folder, json_digest, read_manifest, read_record
from .tensor_files import INDEX_FILE, TENSOR_FILE
from .writing import SHARD_SIZE, save, save_reference_format

__all__ = [
    "INDEX_FILE",
    "RECORD_FILE",
    "SHARD_SIZE",
    "TENSOR_FILE",
    "folder",
    "inflate",
    "json_digest",
    "load",
    "read_manifest",
    "read_record",
    "save",
    "save_reference_format",
]
