"""From the layers of a model and the inputs that they meet to what happens to each of them, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from g3dswap import native
from g3dswap.choice import Choice, Record
from g3dswap.choose import Chooser
from g3dswap.discover import Meeting, Site
from g3dswap.entries import Call, FusedInto, Kept, Layer, PassChoice, Swapped
from g3dswap.errors import NoCompilerError
from g3dswap.fused import NOTHING, Fused, Fusion
from g3dswap.module import Conv, Grouped
from g3dswap.problem import DIRECTIONS, Geometry, Problem, Triple, dtype_name, layer_pass, transposed_size

Choose = Callable[[Problem, int, str], Choice]


@dataclass
class Decision:
    """What happens to one layer."""

    site: Site
    entry: Swapped | Kept
    choices: list[Choice] = field(default_factory=list)
    meetings: Sequence[Meeting] = ()
    fusion: Fusion = NOTHING
    """What is fused into it if it is swapped."""

    @property
    def swap(self) -> bool:
        return isinstance(self.entry, Swapped)

    def keep(self, reason: str) -> None:
        """Leave the layer as it is after all."""
        entry = self.entry
        self.entry = Kept(entry.name, entry.geometry, reason, entry.calls, entry.aliases)
        if self.fusion:
            self.fusion = Fusion(reason="the convolution is kept as it was")

    def fused(self) -> FusedInto | None:
        """The report's line about what is, or was, fused into the layer."""
        module, fusion = self.site.module, self.fusion
        if isinstance(module, Fused):
            fusion = module.origin.fusion
        if not fusion:
            return None
        names = fusion.norm_name, fusion.activation_name, fusion.kind
        return FusedInto(self.site.name, *names, self.site.aliases)


def keep(site: Site, reason: str) -> Decision:
    """The decision to leave a layer as it is."""
    return Decision(site, Kept(site.name, Layer.of(site.module), reason, (), site.aliases))


def swap_later(site: Site, note: str) -> Decision:
    """The decision to swap a layer that chooses its kernels at its first call."""
    note = "" if isinstance(site.module, Grouped) and not note else note
    return Decision(site, Swapped(site.name, Layer.of(site.module), (), site.aliases, note))


def decide(site: Site, meetings: Sequence[Meeting], choose: Choose, fusion: Fusion = NOTHING) -> Decision:
    """Swap a layer if one of its passes gets a kernel of ours, or a norm goes into it; keep it otherwise."""
    layer = Layer.of(site.module)
    calls, choices = [], []
    for meeting in meetings:
        wanted = problems(site.module, meeting, fusion)
        made = [choose(problem, meeting.batch, site.name) for problem in wanted]
        choices += made
        calls.append(call_of(layer, meeting, [pass_of(choice) for choice in made]))
    gains = fusion.norm is not None or not all(choice.is_native for choice in choices)
    swapped = Swapped(site.name, layer, tuple(calls), site.aliases)
    decision = Decision(site, swapped, choices, meetings, fusion)
    if not isinstance(site.module, Grouped) and not gains:
        decision.keep(_why_native(choices))
    return decision


def _why_native(choices: Sequence[Choice]) -> str:
    """One sentence from the reasons of all passes, each said once."""
    reasons: dict[str, list[str]] = {}
    for choice in choices:
        passes = reasons.setdefault(choice.reason, [])
        name = choice.problem.layer_pass.replace("_", "-")
        if name not in passes:
            passes.append(name)
    if len(reasons) == 1:
        return f"PyTorch's own kernels stay in every pass: {next(iter(reasons))}"
    parts = [f"{' and '.join(passes)}: {reason}" for reason, passes in reasons.items()]
    return f"PyTorch's own kernels stay in every pass ({'; '.join(parts)})"


def pass_of(choice: Choice) -> PassChoice:
    """The line of the report for a choice."""
    return PassChoice(
        direction=choice.problem.layer_pass,
        source=choice.source,
        reason=choice.reason,
        seconds=choice.seconds,
        native_seconds=choice.native_seconds,
        error=choice.error,
        native=choice.is_native,
    )


def call_of(layer: Layer, meeting: Meeting, passes: Iterable[PassChoice]) -> Call:
    """The report's form of what a layer met."""
    shape = (meeting.batch, layer.in_channels, *meeting.size)
    kind = meeting.device.type
    return Call(shape, dtype_name(meeting.dtype), meeting.layout, kind, tuple(passes), meeting.output_padding)


def peek(chooser: Chooser, problem: Problem) -> PassChoice:
    """What the options cache says of a problem; nothing is built, tuned or decided."""
    direction = problem.layer_pass
    try:
        entry = chooser.cache.get(chooser.key(problem))
        record = None if entry is None else Record.from_json(entry.value)
    except NoCompilerError:
        return PassChoice(direction, "native", "no compiler", native=True)
    except ValueError:
        record = None
    if record is None:
        return PassChoice(direction, "untuned", "not tuned yet")
    if record.speedup < chooser.min_speedup:
        reason = f"the best kernel was {record.speedup:.2f}x and {chooser.min_speedup:g}x is wanted"
        seconds = record.native_seconds
        return PassChoice(direction, "native", reason, seconds, seconds, native=True)
    return PassChoice(direction, "cached", "", record.seconds, record.native_seconds, record.error)


def problems(conv: Conv, meeting: Meeting, fusion: Fusion = NOTHING) -> list[Problem]:
    """The passes that a layer needs on what it met, with what is fused into it."""
    size, padding = padded(conv, meeting.size)
    channels, filters = conv.in_channels, conv.out_channels
    if conv.transposed:
        extra = meeting.output_padding or conv.output_padding
        size = _triple(transposed_size(size, conv.kernel_size, conv.stride, padding, conv.dilation, extra))
        channels, filters = filters, channels
    geometry = Geometry(
        channels,
        filters,
        conv.groups,
        size,
        _triple(conv.kernel_size),
        _triple(conv.stride),
        padding,
        _triple(conv.dilation),
    )
    trains = not fusion and not isinstance(conv, Fused)
    needed = dict(zip(DIRECTIONS, (True, trains and meeting.grad_input, trains and meeting.grad_weight)))
    activation = conv.activation if isinstance(conv, Fused) else fusion.kind
    bias = conv.bias is not None or fusion.norm is not None
    kind = meeting.device.type
    return [
        Problem(
            layer_pass(name, conv.transposed),
            geometry,
            meeting.dtype,
            meeting.layout,
            kind,
            bias=name == "forward" and bias,
            precision=native.precision(meeting.dtype, kind),
            deterministic=native.deterministic(kind),
            transposed=conv.transposed,
            activation=activation if name == "forward" else "",
        )
        for name, wanted in needed.items()
        if wanted
    ]


def padded(conv: Conv, size: Triple) -> tuple[Triple, Triple]:
    """The size that reaches the kernel and the padding that is left to it.

    Padding with something else than zeros is a step of its own, and so is what "same" adds on one side only.
    """
    if conv.padding == "valid":
        return size, (0, 0, 0)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        before, after = [total // 2 for total in totals], [total - total // 2 for total in totals]
    else:
        before = after = list(_triple(conv.padding))
    if conv.padding_mode != "zeros":
        return _triple(s + b + a for s, b, a in zip(size, before, after)), (0, 0, 0)
    return _triple(s + a - b for s, b, a in zip(size, before, after)), _triple(before)


def _triple(values: Iterable[Any]) -> Triple:
    t, h, w = values
    return int(t), int(h), int(w)
