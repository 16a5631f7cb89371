"""The plan: made once for a model and a composite, printable, reusable."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrp import registry
from lrp._analysis import Analysis
from lrp._graph import Captured, Layout, capture, run_apart
from lrp._identity import PLANNING, attributes_kept, signature, unwrapped
from lrp._inputs import all_finite, as_inputs
from lrp._planner import Planner
from lrp._program import Builder, Program, Wanted, module_outputs
from lrp._unit import COLUMNS
from lrp._vocabulary import functional
from lrp._weights import Bound, check_finite
from lrp.composites import Composite, resolve
from lrp.errors import ExportError, InputError, ModeError, NonFiniteError, PlanError
from lrp.relevance import Ledger, LedgerRow, Relevance
from lrp.rules import Epsilon, Rms
from lrp.seeds import Start, seed

__all__ = ["Plan", "prepare"]

WRT = ("input", "layers", "channels", "weights")
WEIGHT_RULES = ("own", "epsilon")


class _Core:
    """All of a plan but the model: what the cache keeps."""

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        args: tuple[Tensor, ...],
        composite: Composite,
        low: torch.dtype | None = None,
    ) -> None:
        if len(captured.inputs) != len(args):
            raise ExportError(
                f"{type(model).__name__} uses {len(captured.inputs)} of {len(args)} inputs as tensors",
                expected="every input a tensor",
                got=f"{len(args)} inputs",
                fix="bind the others before",
            )
        self.composite = composite
        self.analysis: Analysis = Planner(captured, composite, model, low).run()
        self.bound = Bound(self.analysis)
        self.outputs = module_outputs(self.analysis)
        self.shapes = [tuple(a.shape[1:]) for a in args]
        self.kinds = [(a.dtype, a.device) for a in args]
        self._programs: dict[Wanted, Program] = {}
        self._compiled: dict[tuple[Wanted, str], Any] = {}
        self._lock = threading.Lock()
        self.model_name = type(model).__name__
        targets = [functional(n.target) for n in captured.graph.nodes if n.op == "call_function"]
        self.targets = list(dict.fromkeys(targets))
        self.registered, self.registry_version = registry.applying(model, self.targets), registry.version()
        half = low or next((a.dtype for a in args if a.itemsize == 2), None)
        rules = [u.rule for u in self.analysis.units]
        pure = bool(rules) and all(isinstance(r, Epsilon) and not isinstance(r.epsilon, Rms) for r in rules)
        self.imprecise = half if pure else None

    def program(self, wanted: Wanted) -> Program:
        with self._lock:
            if wanted not in self._programs:
                self._programs[wanted] = Builder(self.analysis, wanted).build()
            return self._programs[wanted]

    def runner(self, wanted: Wanted, backend: str) -> Any:
        """The program's module, compiled where a backend is named."""
        module = self.program(wanted).module
        if not backend:
            return module
        with self._lock:
            key = (wanted, backend)
            if key not in self._compiled:
                self._compiled[key] = torch.compile(module, backend=backend)
            return self._compiled[key]


class Plan:
    """How a model is explained: per layer the rule, its form, its cost and the reason.

    Made by :func:`prepare`. Holds no copy of the model, only the weights that
    had to be folded or modified; a fingerprint of the weights is checked at
    every use, so training on, or editing the model, never leaves it stale.

    Examples
    --------
    >>> import torch, lrp
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> plan = lrp.prepare(model.eval(), torch.zeros(1, 3), composite="epsilon")
    >>> plan.attribute(torch.ones(5, 3)).input.shape
    torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module, core: _Core, identity: tuple[Any, ...], backend: str = "") -> None:
        self.model = model
        self._backend = backend
        self._training = any(m.training for m in model.modules())
        self._core = core
        self._signature = identity

    @property
    def composite(self) -> Composite:
        return self._core.composite

    @property
    def layers(self) -> list[str]:
        """Every module call that has relevance, in execution order."""
        return list(self._core.outputs)

    def __str__(self) -> str:
        a = self._core.analysis
        header = ("layer", "rule", "form", "forward+back", "why this form")
        table = [(r.layer, r.rule, r.form, r.products, r.why) for r in a.rows]
        widths = [max(len(row[i]) for row in [header, *table]) for i in range(4)]
        lines = [f"plan for {self._core.model_name}, composite {self.composite.name}"]
        for row in [header, *table]:
            lines.append("  ".join(c.ljust(w) for c, w in zip(row[:4], widths, strict=True)) + "  " + row[4])
        units = [u.form.products for u in a.units if u.form is not None]
        if units:
            forward, back = (sum(p[i] for p in units) for i in (0, 1))
            ratio = (forward + back) / (2 * len(units))
            lines.append(
                f"{len(units)} linear layers, {forward} products forward and {back} back: "
                f"{ratio:.2f} x those of the plain gradient"
            )
        if a.idle:
            lines.append(f"entries that fit no layer: {', '.join(a.idle)}")
        for name, why in a.unreached.items():
            lines.append(f"no relevance by rule: {name} ({why})")
        return "\n".join(lines)

    def print(self) -> None:
        """Print layer -> rule -> form -> products (forward + back) -> why."""
        print(self)

    def __repr__(self) -> str:
        return f"Plan({self._core.model_name}, {self.composite.name}, {len(self._core.analysis.units)} linear layers)"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry the model and the composite; the plan is made anew."""
        core = self._core
        examples = [(shape, *kind) for shape, kind in zip(core.shapes, core.kinds, strict=True)]
        return _made_again, (self.model, examples, self.composite, self._backend)

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        core = self._core
        shapes = [tuple(t.shape[1:]) for t in inputs]
        if shapes != core.shapes:
            raise PlanError(
                "the input does not have the shape the plan was made for",
                expected=f"(N, ...) with {core.shapes}",
                got=str(shapes),
                fix="call lrp.prepare with an example of this shape",
            )
        for t, (dtype, device) in zip(inputs, core.kinds, strict=True):
            if t.dtype != dtype or t.device != device:
                raise PlanError(
                    "the input has another type or device than the plan's example",
                    expected=f"{dtype} on {device}",
                    got=f"{t.dtype} on {t.device}",
                    fix="convert the input, or prepare a plan for it",
                )

    def _patterns(self, layers: Sequence[str] | str | None) -> tuple[str, ...]:
        if layers is None:
            return tuple(self._core.outputs)
        out: list[str] = []
        for pattern in (layers,) if isinstance(layers, str) else layers:
            hits = [n for n in self._core.outputs if fnmatchcase(n, pattern)]
            if not hits:
                why = self._core.analysis.unreached.get(pattern)
                raise PlanError(
                    f"no layer matches '{pattern}'" + (f": it gets no relevance by rule ({why})" if why else ""),
                    expected="a module name or shell pattern",
                    got=f"known are {', '.join(self._core.outputs)[:300]}",
                    fix="see plan.layers",
                )
            out += [h for h in hits if h not in out]
        return tuple(out)

    def check_model(self) -> None:
        """Raise :class:`PlanError` if the model, or a rule registered for its parts, has changed."""
        with PLANNING:
            now = signature(self.model)
        if now != self._signature:
            training = any(m.training for m in self.model.modules()) and not self._training
            raise PlanError(
                f"{self._core.model_name} has changed since the plan was made",
                expected="the same modules, settings, hooks and mode; weights may change",
                got="a model in training mode" if training else "another structure, setting, hook or mode",
                fix="call model.eval()" if training else "call lrp.prepare again",
            )
        core, version = self._core, registry.version()
        if version != core.registry_version:
            if registry.applying(self.model, core.targets) != core.registered:
                raise PlanError(
                    f"a rule registered for a part of {core.model_name} has changed since the plan was made",
                    expected="the rules of lrp.register as they were",
                    got="others",
                    fix="call lrp.prepare again",
                )
            core.registry_version = version

    def attribute(
        self,
        x: Tensor | tuple[Tensor, ...],
        target: int | Tensor | None = None,
        *,
        wrt: Sequence[str] | str = ("input",),
        start: Start = "logit",
        layers: Sequence[str] | str | None = None,
        ledger: bool = True,
        weight_rule: str = "own",
    ) -> Relevance:
        """Relevance of one batch; see :func:`lrp.attribute`."""
        self.check_model()
        return self._attribute(x, target, wrt, start, layers, ledger, weight_rule=weight_rule)

    def _attribute(
        self,
        x: Tensor | tuple[Tensor, ...],
        target: int | Tensor | None,
        wrt: Sequence[str] | str,
        start: Start,
        layers: Sequence[str] | str | None,
        ledger: bool,
        absolute: tuple[str, ...] = (),
        only: tuple[str, ...] | None = None,
        as_far_as_input: bool = True,
        weight_rule: str = "own",
    ) -> Relevance:
        wrt = (wrt,) if isinstance(wrt, str) or wrt is None else tuple(wrt)
        unknown = [w for w in wrt if w not in WRT]
        if unknown:
            raise InputError(
                f"wrt names something unknown: {unknown}",
                expected=f"any of {WRT}",
                got=repr(wrt),
                fix="choose from these",
            )
        if weight_rule not in WEIGHT_RULES:
            raise InputError(
                "unknown weight_rule",
                expected=" or ".join(map(repr, WEIGHT_RULES)),
                got=repr(weight_rule),
                fix="'own' for the rule of the composite",
            )
        inputs = as_inputs(x, self._core.model_name)
        self._check(inputs)
        if self._core.imprecise is not None:
            warnings.warn(
                f"epsilon in every layer, computed in {self._core.imprecise}: no rule damps the rounding of the "
                "products, which grows with depth; use float32, or gamma or z+ in the convolutions",
                RuntimeWarning,
                stacklevel=3,
            )
        if layers is not None and not {"layers", "channels", "weights"}.intersection(wrt):
            raise InputError(
                "layers= names modules, and no relevance of modules is asked for",
                expected="'layers', 'channels' or 'weights' in wrt",
                got=f"wrt={wrt!r}, layers={layers!r}",
                fix="add one of them to wrt, or drop layers",
            )
        if layers is not None and only is None:
            only = self._patterns(layers)
        books = ledger and self.composite.mode == "lrp"
        tapped = self._patterns(layers) if "layers" in wrt else ()
        wanted = Wanted(tapped, "channels" in wrt, "weights" in wrt, books, absolute, only, weight_rule)
        with torch.inference_mode(False):
            return self._run(inputs, target, start, wanted, isinstance(x, (tuple, list)), as_far_as_input)

    def _run(
        self,
        inputs: tuple[Tensor, ...],
        target: Any,
        start: Start,
        wanted: Wanted,
        several: bool,
        as_far_as_input: bool,
    ) -> Relevance:
        """``as_far_as_input=False`` ends at the first layer of which anything is wanted; the input's is then empty."""
        core = self._core
        program = core.program(wanted)
        table = core.bound.table(self.model)
        n, mode = inputs[0].shape[0], self.composite.mode
        like = inputs[0]

        def zeros(shape: tuple[int, ...], dtype: torch.dtype, wanted: bool = True) -> Tensor:
            return torch.zeros((), dtype=dtype, device=like.device).expand(shape).requires_grad_(wanted)

        xs = [(t.clone() if t.is_inference() else t.detach()).requires_grad_(as_far_as_input) for t in inputs]
        sinks = [zeros(tuple(inputs[i].shape), inputs[i].dtype, as_far_as_input) for i in program.sinks]
        constants = [table[key] for key in program.constants]
        probes = [zeros((n, len(COLUMNS)), torch.float64) for _ in program.probes]
        channel = [zeros((n, count), like.dtype) for _, count in program.channel_probes]
        layer = [zeros(sizes(n), like.dtype) for _, sizes in program.layer_probes]
        if mode == "lrp":
            weight = [zeros(shape, table[key].dtype) for _, key, shape in program.weight_probes]
            placed = weight
        else:
            leaves = {
                key: constants[program.constants.index(key)].requires_grad_() for _, key, _ in program.weight_probes
            }
            weight, placed = list(leaves.values()), []

        with torch.enable_grad():
            given = (*xs, *sinks, *constants, *probes, *channel, *layer, *placed)
            (output,) = core.runner(wanted, self._backend)(*given)
            plain = output.detach()
            if not bool(torch.isfinite(plain).all()):
                self._blame(table)
            coefficient, chosen, started = seed(plain, target, start)
            tensors = [t for t in (*xs, *sinks, *layer, *probes, *channel, *weight) if t.requires_grad]
            grads: tuple[Tensor | None, ...] = (None,) * len(tensors)
            if output.requires_grad:
                grads = torch.autograd.grad(output, tensors, coefficient, allow_unused=True)

        pieces = iter(grads)

        def take(many: list[Tensor]) -> list[Tensor]:
            return [torch.zeros_like(t) if g is None else g for t, g in ((t, next(pieces)) for t in many)]

        result: list[Tensor] = []
        if as_far_as_input:
            multiply = self.composite.multiplies
            result = [x.detach() * c if multiply else c for x, c in zip(xs, take(xs), strict=True)]
            for i, r in zip(program.sinks, take(sinks), strict=True):
                result[i] = result[i] + r
        layers: dict[str, Tensor] = {}
        for (names, _), r in zip(program.layer_probes, take(layer), strict=True):
            for name in names:
                layers[name] = layers[name] + r if name in layers else r
        layers = {name: layers[name] for name in wanted.layers}
        books = {name: LedgerRow.from_table(t) for name, t in zip(program.probes, take(probes), strict=True)}
        channels = {n: r for (names, _), r in zip(program.channel_probes, take(channel), strict=True) for n in names}
        weights = {}
        for (name, key, _), r in zip(program.weight_probes, take(weight), strict=True):
            weights[name] = r * table[key].detach() if mode == "gradient_x_input" else r
        nearest = result if as_far_as_input else [*channels.values(), *weights.values()]
        if not all_finite(nearest):
            raise NonFiniteError(
                f"the relevance of {core.model_name} is not finite",
                expected="finite relevance",
                got=f"NaN or infinity in {like.dtype}",
                fix="run in float32 or float64, or choose a larger epsilon",
            )
        account = None
        if wanted.ledger:
            delivered = torch.stack([Layout(0).per_sample(r.double()) for r in result]).sum(0)
            account = Ledger(Layout(0).per_sample(started.double()), delivered, books)
            self._check_books(account, plain)
        return Relevance(
            result[0] if as_far_as_input and not several else tuple(result),
            plain,
            chosen,
            layers,
            channels,
            weights,
            account,
            dict(core.analysis.unreached),
        )

    def _check_books(self, account: Ledger, output: Tensor) -> None:
        """Warn where the books do not close: what cancels inside is too large for the precision."""
        limit = 1e-6 if output.dtype == torch.float64 and self._core.analysis.low is None else 1e-3
        if output.itemsize == 2 or self._core.analysis.low is not None:
            limit = 0.3
        open_share = account.gap.abs() / account.magnitude().clamp_min(1e-300)
        if not bool((open_share <= limit).all()):  # NaN as well
            warnings.warn(
                f"the books of {self._core.model_name} do not close: {float(open_share.max()):.1%} of the relevance is "
                "unexplained. Relevances much larger than their sum cancel inside: try float64, a larger epsilon or "
                "another rule; rel.ledger shows where",
                RuntimeWarning,
                stacklevel=4,
            )

    def verify(self, example: tuple[Tensor, ...]) -> None:
        """Check the plan against the model: same output, and no sample in another's.

        Done once, on the first sample of the example and on noise.

        Raises
        ------
        PlanError
            If the outputs differ by more than rounding.
        ModeError
            If the output of a sample depends on the other samples.
        """
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(e[:1].shape, generator=generator).to(e.device, e.dtype) for e in example]
        pair = tuple(torch.cat([e[:1], e[:1] + n]).detach() for e, n in zip(example, noise, strict=True))
        alone = tuple(p[:1] for p in pair)
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore", RuntimeWarning)  # noise may leave the box of ZBox
            ours, single, theirs = self._forward(pair), self._forward(alone), run_apart(self.model, pair)
            one = run_apart(self.model, alone)
        low = ours.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(ours.device.type)
        exact = ours.device.type == "cpu"  # elsewhere float32 products may be TF32, with 10 bits
        limit = 0.2 if low else 1e-9 if ours.dtype == torch.float64 else 1e-3 if exact else 2e-2

        def check(a: Tensor, b: Tensor) -> float:
            sound = torch.isfinite(b).reshape(len(b), -1).all(1)  # noise may leave the domain of a logarithm
            a, b = a[sound], b[sound]
            if not b.numel():
                return 0.0
            return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))

        worst = max(check(ours, theirs), check(single, one))
        if not worst <= limit:
            raise PlanError(
                f"the plan's output differs from that of {self._core.model_name}",
                expected=f"equality to {limit:g}",
                got=f"a relative difference of {worst:.2g}",
                fix="the forward pass depends on something outside the graph (a random number, a global, the number "
                "of samples); make it a function of its input",
            )
        if not check(single, ours[:1]) <= limit:
            raise ModeError(
                f"the samples of a batch influence each other in {self._core.model_name}",
                expected="the output of a sample to depend on that sample only",
                got=f"a relative change of {check(single, ours[:1]):.2g} when another sample joins it",
                fix="compute statistics, attention and softmax along axes other than the first "
                "(batch_first=True for nn.MultiheadAttention)",
            )
        if self.composite.mode in ("gradient", "gradient_x_input"):
            self._verify_gradient(pair, limit)

    def _forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        table, program = self._core.bound.table(self.model), self._core.program(Wanted())
        xs = [t.clone() for t in inputs]
        sinks = [torch.zeros_like(inputs[i]) for i in program.sinks]
        out: Tensor = program.module(*xs, *sinks, *(table[key] for key in program.constants))[0]
        return out

    def _verify_gradient(self, inputs: tuple[Tensor, ...], limit: float) -> None:
        """A forward pass may change its own gradient (no_grad, a custom function): the graph must have seen it."""
        with torch.inference_mode(False), torch.enable_grad():
            results = []
            for run in (self._forward_with_grad, self.model):
                xs = tuple(t.clone().requires_grad_() for t in inputs)
                results.append(torch.autograd.grad(run(*xs).sum(), xs, allow_unused=True))
        for ours, theirs in zip(*results, strict=True):
            if ours is None or theirs is None:
                same = (ours is None or not ours.any()) and (theirs is None or not theirs.any())
            else:
                size = theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)
                same = bool((ours - theirs).abs().max() <= 100 * limit * size)
            if not same:
                raise PlanError(
                    f"the gradient of the plan differs from that of {self._core.model_name}",
                    expected="a forward pass whose gradient is that of its operations",
                    got="torch.no_grad, detach or a custom autograd.Function inside forward",
                    fix="use torch.autograd on the model itself, or an LRP composite",
                )

    def _forward_with_grad(self, *xs: Tensor) -> Tensor:
        table, program = self._core.bound.table(self.model), self._core.program(Wanted())
        out: Tensor = program.module(*xs, *(table[key] for key in program.constants))[0]
        return out

    def _blame(self, table: dict[Any, Tensor]) -> None:
        constants = self._core.analysis.captured.constants
        named = [(name, table[node]) for node, (_, name) in constants.items() if isinstance(node, fx.Node)]
        check_finite(self._core.model_name, named)
        raise NonFiniteError(
            f"the output of {self._core.model_name} is not finite",
            expected="finite logits",
            got="NaN or infinity, from finite inputs and weights",
            fix="check the scale of the input and the precision",
        )


@dataclass
class _Known:
    """What is kept of one model, while it lives and stays as it was."""

    signature: tuple[Any, ...]
    graphs: dict[Any, Captured] = field(default_factory=dict)
    plans: dict[Any, _Core] = field(default_factory=dict)


_CACHE: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_MAX_PLANS = 8


def prepare(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    composite: Any = "epsilon_plus",
    *,
    compile: bool | str = False,
) -> Plan:
    """Make the plan of a model, without running it on data.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. It is not modified.
    example : Tensor (N, ...) or tuple of them
        Shape, type and device matter; values and N do not.
    composite : str, Rule or Composite
        See :mod:`lrp.composites`.
    compile : bool or str
        Run the plan through ``torch.compile`` (its default backend, or the one
        named): the same numbers to rounding; the first call of every kind
        compiles, which takes much longer than a call.

    Returns
    -------
    Plan

    Raises
    ------
    ExportError, OutputError, ModeError
        If the model's graph can not be captured or has no single output.
    UnsupportedOperationError
        If relevance would have to pass an operation without a rule.
    CompositeError, RuleError
        If a layer has no rule, or one that can not hold there.

    Notes
    -----
    Costs one export, 0.3 s to a few seconds; plans are kept per model while it
    lives, so later calls only pay for a look-up.

    Examples
    --------
    >>> import torch, lrp
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    >>> plan = lrp.prepare(net.eval(), torch.zeros(1, 1, 4, 4), composite="epsilon_plus")
    >>> [row.split()[0] for row in str(plan).splitlines()[2:4]]
    ['0', '3']
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            "the model is not an nn.Module",
            expected="a torch.nn.Module",
            got=type(model).__name__,
            fix="for scikit-learn estimators use neuralize.neuralize",
        )
    chosen = resolve(composite)
    backend = compile if isinstance(compile, str) else "inductor" if compile else ""
    if backend and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise InputError(
            "torch.compile has no such backend",
            expected=f"True, or one of {sorted(torch.compiler.list_backends(exclude_tags=()))}",
            got=repr(compile),
            fix="choose one of them",
        )
    model = unwrapped(model)
    inputs = as_inputs(example, type(model).__name__)
    args = tuple(t.detach() for t in inputs)
    kind = args[0].device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key = (
        tuple((tuple(a.shape[1:]), a.dtype, a.device) for a in args),
        tuple({(p.dtype, p.device) for p in model.parameters()}),
        low,
    )
    recipe = chosen.recipe()
    which = (key, recipe, registry.version())
    with PLANNING:
        now = signature(model)
        known = _CACHE.get(model)
        if known is None or known.signature != now:
            known = _CACHE[model] = _Known(now)
        held = known.plans.get(which)
        if held is not None and held.composite.recipe() == recipe:  # and it was not changed since
            return Plan(model, held, now, backend)
        with attributes_kept(model), torch.inference_mode(False):
            args = tuple(a.clone() if a.is_inference() else a for a in args)
            if key not in known.graphs:
                captured = capture(model, args)
                _make_room(known.graphs)
                known.graphs[key] = captured
            if chosen.mode in ("guided_backprop", "deconvnet"):
                prepare(model, args, "gradient")  # whose gradient is checked against the model's
            core = _Core(model, known.graphs[key], args, chosen, low)
            plan = Plan(model, core, now, backend)
            plan.verify(args)
        _make_room(known.plans)
        known.plans[which] = core
        return plan


def _made_again(model: nn.Module, examples: list[Any], composite: Composite, backend: str) -> Plan:
    example = tuple(torch.zeros((1, *shape), dtype=dtype, device=device) for shape, dtype, device in examples)
    return prepare(model, example, composite, compile=backend)


def _make_room(kept: dict[Any, Any]) -> None:
    while len(kept) >= _MAX_PLANS:
        kept.pop(next(iter(kept)))
