"""A process in which Inductor finds a GPU that is not there.

What it asks is kept in caches of torch for the rest of the process, so a process can pretend to have one GPU only.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from unittest.mock import patch

import torch

from dgpo_fast.errors import UserError

KNOWN = "2.11 to 2.13"


class _Driver:
    """In place of triton's driver, which looks for CUDA's libraries."""

    def __init__(self, properties: SimpleNamespace):
        self.properties = properties
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        """As triton's `utils` gives them."""
        return {"max_shared_mem": self.properties.shared_memory_per_block_optin}


@contextlib.contextmanager
def pretended(properties: SimpleNamespace) -> Iterator[None]:
    """Device 0 is a GPU with `properties`, on which nothing can run."""
    try:
        import torch.utils._triton
        from torch._dynamo.device_interface import CudaInterface
    except ImportError as error:
        raise other_version(error) from None
    try:
        from triton.runtime.driver import driver
    except ImportError:
        raise UserError("triton is not installed, with which torch writes kernels: pip install triton") from None

    capability = (properties.major, properties.minor)
    answers = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: properties,
    }
    of_torch = {
        "get_device_capability": lambda device=None: capability,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "device": lambda device: contextlib.nullcontext(),
    }
    of_interface = {
        "get_compute_capability": lambda device=None: 10 * properties.major + properties.minor,
        "get_raw_stream": lambda device: 0,
    }
    interface = {name: staticmethod(answer) for name, answer in (answers | of_interface).items()}
    with (
        replaced(torch.cuda, **answers, **of_torch),
        replaced(CudaInterface, **interface),
        replaced(CudaInterface.Worker, get_device_properties=interface["get_device_properties"]),
        replaced(torch.utils._triton, triton_hash_with_backend=lambda: properties.name),
        replaced(driver, _active=_Driver(properties)),
    ):
        torch.utils._triton.has_triton.cache_clear()
        yield


def replaced(owner: object, **by: object) -> AbstractContextManager:
    """Puts others in the place of attributes of `owner`. Raises UserError if this version of torch has no such ones."""
    missing = [name for name in by if not hasattr(owner, name)]
    if missing:
        raise other_version(f"{getattr(owner, '__name__', owner)} has no {missing[0]}")
    return patch.multiple(owner, **by)


def other_version(found: object) -> UserError:
    """The error to raise if torch or triton differ inside from what is known here."""
    return UserError(f"torch {torch.__version__} is not one of {KNOWN}, whose compiler is looked into here: {found}")
