"""Nearest upsampling and the 3 × 3 convolution behind it, as four 2 × 2 convolutions of the small picture.

Of the four pixels that one becomes, each sees a 3 × 3 window in which the small picture's pixels repeat. Those of one
row of pixels, with the kernel's rows a, b, c: (upper) a·x[i − 1] + (b + c)·x[i], (lower) (a + b)·x[i] + c·x[i + 1];
columns alike. So 16 products stand for 36. Only the rounding differs: the weights are added up once.
"""

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

# Rows of a 3 × 3 kernel that fall on the two rows of the small picture under an upper and a lower pixel.
ROWS = (((0,), (1, 2)), ((0, 1), (2,)))


class PhasedUpsample(nn.Module):
    """`Upsample2D` with a 3 × 3 convolution: (B, C, H, W) → (B, C', 2H, 2W), in channels_last.

    Args:
        upsample: has the weights, which are read once.
    """

    def __init__(self, upsample: Upsample2D):
        super().__init__()
        convolution = upsample.conv
        exact = convolution.weight.detach().to(torch.promote_types(convolution.weight.dtype, torch.float32))
        phases = [
            torch.stack(
                [torch.stack([exact[:, :, rows][..., columns].sum((2, 3)) for columns in across], -1) for rows in down],
                -2,
            )
            for down in ROWS
            for across in ROWS
        ]
        weight = torch.cat(phases).to(convolution.weight.dtype).contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if convolution.bias is None else nn.Parameter(convolution.bias.detach().repeat(4), False)

    def forward(self, hidden_states: Tensor, output_size: object = None) -> Tensor:
        """See the class. `output_size` is the decoder's, and not used by it."""
        batch, _, height, width = hidden_states.shape
        # Row y of the result saw rows y − 1 and y: those of the upper pixels of row y, and of the lower ones of y − 1.
        found = F.conv2d(hidden_states, self.weight, self.bias, padding=1).permute(0, 2, 3, 1)
        phases = found.unflatten(-1, (2, 2, -1))
        rows = [torch.stack([phases[:, y : y + height, x : x + width, y, x] for x in (0, 1)], 3) for y in (0, 1)]
        return torch.stack(rows, 2).reshape(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def in_phases(decoder: nn.Module) -> None:
    """Exchanges the upsampling layers of `decoder` that are nearest ones with a 3 × 3 convolution."""
    for name, module in list(decoder.named_modules()):
        if isinstance(module, Upsample2D) and _fits(module):
            decoder.set_submodule(name, PhasedUpsample(module))


def _fits(upsample: Upsample2D) -> bool:
    convolution = getattr(upsample, "conv", None)
    return (
        upsample.norm is None
        and upsample.interpolate
        and not upsample.use_conv_transpose
        and isinstance(convolution, nn.Conv2d)
        and convolution.kernel_size == (3, 3)
        and convolution.padding == (1, 1)
        and convolution.groups == 1
    )
