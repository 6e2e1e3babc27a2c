"""Where in a model numbers stop being finite."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def watched(**modules: nn.Module) -> Iterator[list[str]]:
    """Gives a list to which the first layer of `modules` comes whose output is not finite, as "the decoder's conv_in".

    Each layer's output is waited for, so this is for looking into a failure, not for a run. Compiled layers run as
    they were before.

    Args:
        modules: by their names in messages.
    """
    found: list[str] = []

    def look(name: str, output: object) -> None:
        outputs = output if isinstance(output, tuple | list) else [output]
        if not found and any(isinstance(one, Tensor) and not torch.isfinite(one).all() for one in outputs):
            found.append(name)

    with torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
        for part, module in modules.items():
            for name, layer in module.named_modules():
                hook = layer.register_forward_hook(
                    lambda layer, inputs, output, place=f"the {part}'s {name}": look(place, output)
                )
                hooks.callback(hook.remove)
        yield found
