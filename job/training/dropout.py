"""Dropout whose masks depend on seed, step, example and position, and not on how a step is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer

if TYPE_CHECKING:
    import peft


class DropoutKeys:
    """The keys of the tokens of a micro-batch, from which every adapter computes its own mask.

    A mask is a counter-based hash (Salmon et al., 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") of seed, step,
    number of the example in the step, position in the example, adapter and feature. So it is the same in every order
    and division of the micro-batches, in a recomputation, and on every device.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._modules = 0
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._keys = torch.empty(0, dtype=torch.int32)
        self._features = torch.empty(0, dtype=torch.int32)

    def add_module(self) -> int:
        """Return the number of a further adapter."""
        self._modules += 1
        return self._modules - 1

    def tokens(self, step: int, indices: Sequence[int], lengths: Sequence[int], *, packed: bool) -> torch.Tensor:
        """Return a number for each token of a micro-batch: of texts with these numbers in the step, and lengths.

        Packed, the texts are concatenated; padded, each has a row of the longest one's length. int64, on the CPU.
        """
        of_step = _mix(_mix(torch.tensor(self._seed)) ^ step)
        rows = _mix(_mix(of_step ^ torch.tensor(indices))[:, None] ^ torch.arange(max(lengths)))
        found = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)]) if packed else rows
        return found.flatten()

    def set_tokens(self, tokens: torch.Tensor) -> None:
        """Set the tokens of the next micro-batch, as `tokens` returns them, on the device."""
        self._tokens = tokens
        self._keys = self._keys_of_modules(self._tokens)

    def _keys_of_modules(self, tokens: torch.Tensor) -> torch.Tensor:
        modules = torch.arange(self._modules, device=tokens.device)
        return _odd_int32(_mix(tokens ^ modules[:, None]))

    def mask(self, module: int, x: torch.Tensor, rate: float) -> torch.Tensor:
        """Return the mask of an adapter for its input [..., features]: bool, true where a value is dropped.

        It multiplies a random odd number of each token with one of each feature (multiply-shift, Dietzfelbinger et
        al., 1997): two passes, a fifth of the time of a generator on a CPU.
        """
        rows, features = x.shape[:-1].numel(), x.shape[-1]
        if len(self._features) < features or self._features.device != x.device:
            self._features = _odd_int32(_mix(torch.arange(features, device=x.device)))
        if rows == len(self._tokens):
            keys = self._keys[module]
        else:  # a layer that sees only some of the tokens, such as an expert: its masks depend on the micro-batch
            keys = self._keys_of_modules(_mix(self._tokens[:1] ^ torch.arange(rows, device=x.device)))[module]
        products = keys[:, None] * self._features[:features]  # modulo 2^32
        return (products < round(-(2**31) + rate * 2**32)).view(x.shape)


class KeyedDropout(torch.nn.Module):
    """Dropout on the input of one adapter, with the masks of DropoutKeys."""

    def __init__(self, rate: float, keys: DropoutKeys) -> None:
        super().__init__()
        self.rate = rate
        self._keys = keys
        self._number = keys.add_module()

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mask for an input: bool of its shape, true where a value is dropped."""
        return self._keys.mask(self._number, x, self.rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop values in training, and scale the others so that the mean stays the same."""
        return x.masked_fill(self.mask(x), 0.0) / (1 - self.rate) if self.training else x


@contextmanager
def installed(model: peft.PeftModel, keys: DropoutKeys) -> Iterator[list[str]]:
    """Give the adapters keyed dropout and switch off the base model's own, until the end of the block.

    Yields the names of the base model's dropout rates that were not zero. Attention draws its mask inside a fused
    kernel, so it cannot be keyed; and a frozen base model learns nothing that dropout could regularise.
    """
    adapters = [module.lora_dropout for module in model.modules() if isinstance(module, LoraLayer)]
    replaced: list[tuple[torch.nn.ModuleDict, str, torch.nn.Module]] = []
    for adapter in adapters:
        for name, own in adapter.items():
            if isinstance(own, torch.nn.Dropout):
                replaced.append((adapter, name, own))
                adapter[name] = KeyedDropout(own.p, keys).train(own.training)
    rates = list(_base_rates(model))
    for owner, name, _ in rates:
        setattr(owner, name, 0.0)
    try:
        yield sorted({f"{type(owner).__name__}.{name}" for owner, name, _ in rates})
    finally:
        for adapter, name, own in replaced:
            adapter[name] = own.train(adapter[name].training)
        for owner, name, rate in rates:
            setattr(owner, name, rate)


def _base_rates(model: peft.PeftModel) -> Iterator[tuple[Any, str, float]]:
    """Yield the dropout rates above zero of the base model: their owner, attribute and value."""
    base: Any = model.get_base_model()
    for owner in (base.config, *base.modules()):
        if isinstance(owner, torch.nn.Dropout):
            yield from ((owner, "p", owner.p),) if owner.p else ()
        elif not isinstance(owner, (LoraLayer, KeyedDropout)):
            for name, value in list(vars(owner).items()):
                if "drop" in name and isinstance(value, float) and value:
                    yield owner, name, value


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Hash int64 to int64, one to one (SplitMix64, Steele et al., 2014); torch's integers wrap around."""
    x = x - 7046029254386353131  # 0x9e3779b97f4a7c15 as a signed number, and so on
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right and fill with zeros; torch's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _odd_int32(x: torch.Tensor) -> torch.Tensor:
    """Return the lower halves of int64 numbers as odd int32 numbers."""
    return x.contiguous().view(torch.int32).view(*x.shape, 2)[..., 0] | 1
