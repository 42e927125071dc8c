# SPDX-License-Identifier: Apache-2.0
"""Replay windows as custom operators of PyTorch: torch.ops.gatedelta.window_forward, _accept, _reset, _fold, _state_of, _copy.

An operator gets the tensors of a window, and declares those that it writes as mutated. Outside of compilers and tracers the
methods of ReplayWindow call the library on the same tensors without PyTorch's dispatch.
"""

import torch

from . import _core
from ._errors import InvalidArgument

_SETTINGS = "int capacity, int null_slot, str? backend"


def _define(name, mutated, arguments, function):
    """gatedelta::window_NAME on a window's tensors, of which those in `mutated` are written."""
    tensors, marks = [], iter("zyxwut")
    for part in ("states", "keys", "corrections", "decays", "length", "order"):
        mark = f"({next(marks)}!)" if part in mutated else ""
        tensors.append(f"Tensor{mark}{'' if part in ('length', 'order') else '[]'} {part}")

    def call(states, keys, corrections, decays, length, order, *values):
        capacity, null_slot, backend = values[-3:]
        window = _core.ReplayWindow.over(states, (length, order), list(zip(keys, corrections, decays)), capacity=capacity,
                                         null_slot=null_slot, backend=backend)  # fmt: skip
        function(window, *values[:-3])

    written = tuple(mutated) + tuple(part.split()[-1] for part in arguments.split(", ") if "!" in part)
    schema = f"({', '.join([*tensors, arguments, _SETTINGS])}) -> ()"
    operator = torch.library.custom_op(f"gatedelta::window_{name}", call, mutates_args=written, schema=schema)
    operator.register_fake(lambda *values: None)


_LAYER = ("states", "keys", "corrections", "decays")
_RECORD = ("length", "order")
_FORWARD = (
    "Tensor(o!) o, Tensor q, Tensor k, Tensor v, Tensor? a, Tensor? A_log, Tensor? dt_bias, Tensor? g, Tensor? b, Tensor? beta, "
    "Tensor? read_slots, Tensor? cu_seqlens, Tensor? parent, float? scale, bool qk_l2norm, float l2_eps, float softplus_beta, "
    "float softplus_threshold, bool negative_eigenvalues, int num_threads, int rule_null_slot, str? rule_backend"
)
_FORWARD_NAMES = [part.split()[-1].removeprefix("rule_") for part in _FORWARD.split(", ")]

_define("forward", _LAYER, _FORWARD, lambda window, *values: _core.forward(window=window, **dict(zip(_FORWARD_NAMES, values))))
_define(
    "accept",
    _RECORD,
    "Tensor accepted, Tensor? slots, int? tokens, Tensor? cu_seqlens, Tensor? path",
    lambda window, accepted, slots, tokens, cu_seqlens, path: window.accept(
        accepted, slots, tokens=tokens, cu_seqlens=cu_seqlens, path=path
    ),
)
_define("reset", _RECORD, "Tensor? slots", lambda window, slots: window.reset(slots))
_define("fold", ("states", *_RECORD), "Tensor slots", lambda window, slots: window.fold(slots))
_define("state_of", (), "Tensor slots, Tensor(o!) out", lambda window, slots, out: window.state_of(slots, out))
_define("copy", (*_LAYER, *_RECORD), "Tensor from_slots, Tensor to_slots", lambda window, *slots: window.copy(*slots))


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def needs_operator(tensors):
    """Whether somebody has to see an operator: a compiler or a tracer, a mode or a subclass of tensors, or autograd."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return True
    return _core._any_special(tensors, _PLAIN, torch.is_grad_enabled())


def written(*tensors):
    """Tells autograd, as PyTorch does of what operators mutate."""
    torch.autograd.graph.increment_version([x for x in tensors if x is not None and x is not True and x is not False])


class ReplayWindow:
    """gatedelta.ReplayWindow of tensors, whose methods torch.compile and torch.export understand. `states` and the windows'
    own tensors are attributes: `keys`, `corrections`, `decays` (a list each), `length` and `order`.

    For the arguments and methods see gatedelta.ReplayWindow; there is no `stream`, which is the current one.
    """

    def __init__(
        self,
        states: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...],
        *,
        k_heads: int,
        capacity: int = 16,
        entries: str = "bfloat16",
        max_tokens: int = 0,
        null_slot: int = -1,
        backend: str | None = None,
    ):
        self.states = list(states) if isinstance(states, (list, tuple)) else [states]
        if not self.states:
            raise InvalidArgument("states: expected a tensor for each layer, got none")
        if self.states[0].dim() != 4:
            raise InvalidArgument(f"state: expected [slots, H, V, K], got {list(self.states[0].shape)}")
        if entries not in ("bfloat16", "float32"):
            raise InvalidArgument(f"entries: expected bfloat16 or float32, got {entries}")
        if not (4 <= capacity <= 64 and 0 <= max_tokens <= capacity):
            raise InvalidArgument(f"capacity: expected 4..64 and max_tokens within it, got {capacity} and {max_tokens}")
        slots, heads, value_dim, key_dim = self.states[0].shape
        ring = capacity + (max_tokens or capacity)
        like, dtype = self.states[0], getattr(torch, entries)
        self.keys = [like.new_zeros((slots, k_heads, ring, key_dim), dtype=dtype) for _ in self.states]
        self.corrections = [like.new_zeros((slots, heads, ring, value_dim), dtype=dtype) for _ in self.states]
        self.decays = [like.new_zeros((slots, heads, ring), dtype=torch.float32) for _ in self.states]
        self.length = like.new_zeros((slots,), dtype=torch.int32)
        self.order = like.new_zeros((slots, ring), dtype=torch.int32)
        self.capacity, self.max_tokens, self.layers = capacity, ring - capacity, len(self.states)
        self._settings = (capacity, null_slot, backend)
        self._window = _core.ReplayWindow.over(
            self.states, (self.length, self.order), list(zip(self.keys, self.corrections, self.decays)), capacity=capacity,
            null_slot=null_slot, backend=backend)  # fmt: skip
        self._window.reset()

    def _layer(self, layer):
        """The tensors of one layer, and what all share."""
        return [self.states[layer]], [self.keys[layer]], [self.corrections[layer]], [self.decays[layer]], self.length, self.order

    def _all(self):
        return self.states, self.keys, self.corrections, self.decays, self.length, self.order

    def accept(
        self,
        accepted: torch.Tensor,
        slots: torch.Tensor | None = None,
        *,
        tokens: int | None = None,
        cu_seqlens: torch.Tensor | None = None,
        path: torch.Tensor | None = None,
    ) -> None:
        """Keeps accepted tokens [N] of the last step, in all layers."""
        if needs_operator((accepted, slots, cu_seqlens, path)):
            torch.ops.gatedelta.window_accept(*self._layer(0), accepted, slots, tokens, cu_seqlens, path, *self._settings)
        else:
            self._window.accept(accepted, slots, tokens=tokens, cu_seqlens=cu_seqlens, path=path)
            written(self.length, self.order)

    def reset(self, slots: torch.Tensor | None = None) -> None:
        """Empties the windows of slots [N]; all where it is left out."""
        if needs_operator((slots,)):
            torch.ops.gatedelta.window_reset(*self._layer(0), slots, *self._settings)
        else:
            self._window.reset(slots)
            written(self.length, self.order)

    def fold(self, slots: torch.Tensor) -> None:
        """Brings the states of slots [N] up to date in all layers and empties their windows."""
        if needs_operator((slots,)):
            torch.ops.gatedelta.window_fold(*self._all(), slots, *self._settings)
        else:
            self._window.fold(slots)
            written(*self.states, self.length, self.order)

    def state_of(self, slots: torch.Tensor, out: torch.Tensor | None = None, *, layer: int = 0) -> torch.Tensor:
        """The states [N,H,V,K] of slots as they would be without a window; written to `out` if that is given."""
        if out is None:
            out = self.states[layer].new_empty((slots.shape[0], *self.states[layer].shape[1:]))
        if needs_operator((slots, out)):
            torch.ops.gatedelta.window_state_of(*self._layer(layer), slots, out, *self._settings)
        else:
            self._window.state_of(slots, out, layer=layer)
            written(out)
        return out

    def copy(self, from_slots: torch.Tensor, to_slots: torch.Tensor) -> None:
        """Forks sequences: slot to_slots[n] becomes a copy of from_slots[n], states and windows of all layers."""
        if needs_operator((from_slots, to_slots)):
            torch.ops.gatedelta.window_copy(*self._all(), from_slots, to_slots, *self._settings)
        else:
            self._window.copy(from_slots, to_slots)
            written(*self.states, *self.keys, *self.corrections, *self.decays, self.length, self.order)
