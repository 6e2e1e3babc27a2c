"""The decoder of a run: channels_last, upsampled in phases, compiled, and overlapping with the rollout."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dgpo_fast.engine import compile
from dgpo_fast.engine.timing import best_ms
from dgpo_fast.engine.upsampling import in_phases
from dgpo_fast.models.latents import Pictures, decode_in_batches, decode_pixels, to_uint8

CHECKED_IMAGES = 4
LARGEST_MEAN_DIFFERENCE = 1.0
"""Of 255: if bf16 pictures differ by more on average, fp32 decodes."""
TIMED_S = 1.0
WAYS = ("plain", "fast", "phases")


class Decoder:
    """Latents → uint8 pictures.

    The first pictures of a decoder that is not plain fp32 are compared with those of plain fp32. If they are not finite
    or differ by more than `LARGEST_MEAN_DIFFERENCE` on average, fp32 takes over.

    Args:
        vae: the pipeline's; it stays as it is. Any but an `AutoencoderKL` decodes the plain way.
        batch_size: pictures at a time.
        way: "plain"; "fast", channels_last in a copy of the decoder; "phases", as fast, and upsampled in four phases.
        compiled: compile that copy, for whole batches.
        overlap: decode on a stream of its own, if there is a GPU.
        note: called with one line on the comparison's result.
    """

    def __init__(
        self, vae: nn.Module, batch_size: int, *, way: str, compiled: bool, overlap: bool, note: Callable[[str], None]
    ):
        way = way if has_own_decoder(vae) else "plain"
        self.original, self.batch_size, self.note = vae, batch_size, note
        self.vae: Any = vae
        self.dtype = next(vae.parameters()).dtype
        self.static = way != "plain" and compiled
        if way != "plain":
            self.vae = _with_own_decoder(vae, memory_format=torch.channels_last)
        if way == "phases":
            in_phases(self.vae.decoder)
        if self.static:
            self.vae.decoder.compile(fullgraph=True, dynamic=False, backend=compile.BACKEND)
        self.checked = not self.static and way != "phases" and self.dtype == torch.float32
        device = next(vae.parameters()).device
        self.stream = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None

    @property
    def overlaps(self) -> bool:
        """Whether it works while its caller continues."""
        return self.stream is not None

    def __call__(self, latents: Tensor) -> Pictures:
        """(B, C, H, W) latents → pictures, rounded as diffusers rounds them."""
        return self.start(latents)()

    @torch.no_grad()
    def start(self, latents: Tensor) -> Callable[[], Pictures]:
        """Begins to decode, after what `latents` wait for, and returns what waits for the pictures.

        On a CPU the work is done when the pictures are asked for.
        """
        if not self.checked:
            self._check(latents)
        if self.stream is None:
            return lambda: Pictures(*(part.cpu().numpy() for part in self.decode(latents)))
        self.stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(self.stream):
            decoded = self.decode(latents)
            latents.record_stream(self.stream)
            host = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in decoded]
            for part, copy_of_it in zip(decoded, host, strict=True):
                copy_of_it.copy_(part, non_blocking=True)
            done = self.stream.record_event()

        def wait() -> Pictures:
            done.synchronize()
            return Pictures(*(part.numpy() for part in host))

        return wait

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) latents → the parts of their `Pictures`, on their device; the decoder is not checked."""
        return decode_in_batches(self._pixels, latents, self.batch_size)

    def _pixels(self, latents: Tensor) -> Tensor:
        """(B, 3, height, width) in [−1, 1] if the decoder is sure."""
        rows = len(latents)
        if self.static and rows < self.batch_size:
            latents = torch.cat([latents, latents[-1:].expand(self.batch_size - rows, *latents.shape[1:])])
        return decode_pixels(self.vae, latents)[:rows]

    def _check(self, latents: Tensor) -> None:
        """Compares the first pictures with fp32's, once, and takes fp32 if they are too far apart."""
        few = latents[torch.isfinite(latents).flatten(1).all(1)][:CHECKED_IMAGES]
        if len(few) == 0:
            return  # nothing that a decoder could be blamed for
        self.checked = True
        exact = _with_own_decoder(self.original, dtype=torch.float32)
        expected, found = decode_pixels(exact, few), self._pixels(few)
        difference = (to_uint8(found).int() - to_uint8(expected).int()).abs().float()
        precision, finite = str(self.dtype).removeprefix("torch."), bool(torch.isfinite(found).all())
        about = f"{precision} decoder: its numbers are not finite"
        if finite:
            mean, largest = difference.mean(), difference.max()
            about = f"{precision} decoder: {mean:.2g} of 255 from fp32's pictures on average, {largest:.0f} at most"
        if not finite or difference.mean() > LARGEST_MEAN_DIFFERENCE:
            self.vae, self.dtype, self.static = exact, torch.float32, False
            about += "; fp32 decodes instead"
        self.note(about)


def decoder_ms(decoders: Sequence[Decoder], latents: Tensor) -> list[float]:
    """Milliseconds that each of `decoders` takes for `latents`, measured in turns."""
    ways = [partial(decoder.decode, latents) for decoder in decoders]
    return best_ms(ways, latents.device, TIMED_S)


def has_own_decoder(vae: nn.Module) -> bool:
    """Whether its decoder's layers are exchanged: of an `AutoencoderKL`."""
    return isinstance(vae, AutoencoderKL)


def _with_own_decoder(vae: nn.Module, **to: Any) -> Any:
    """A copy of `vae` that can only decode, with a decoder of its own, moved as `nn.Module.to` takes it."""
    if not isinstance(vae, AutoencoderKL):
        return copy.deepcopy(vae).to(**to)
    # Without what encodes, the copy's weights are of one dtype.
    own = copy.deepcopy(vae, {id(part): None for part in (vae.encoder, vae.quant_conv) if part is not None})
    torch.nn.Module.to(own, **to)
    return own
