"""The way of a slot on an example: stored, read, taken apart by samples, edited, and edited again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, fx, nn

from fisedit_compiler.graph.inputs import SlotInput
from fisedit_compiler.graph.ir import target_name
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.slots.agreement.comparing import form_of, problem_of
from fisedit_compiler.slots.agreement.example import SAMPLES, Example, NoExample, Use, Values, part
from fisedit_compiler.slots.asking import REMEDY, refuse, said
from fisedit_compiler.slots.base import Slot
from fisedit_compiler.slots.turn import Edit, Turn
from fisedit_compiler.slots.written import Written

Stored = dict[str, Tensor]
"""What is stored of slots, by name."""
SCALES = (64.0, 1 / 64)
"""By what values are multiplied for further looks at what rounding does to them."""


class Trial:
    """Tries the first of some slots, of which each is about the next."""

    def __init__(self, chain: Sequence[Use], example: Example) -> None:
        self.use, self.slot, self.example = chain[0], chain[0].slot, example
        self.order = tuple(reversed(chain))
        self.exact = self.slot.kind.holds in ("value", "packed")
        self.knows_rows = example.has_sites and all(
            example.rows(use, example.values, example.turn(0)) is not None for use in chain if use.rows is not None
        )

    def run(self) -> None:
        """Take the way.

        Raises:
            SlotKindError: the kind contradicts itself.
        """
        values = self.example.values
        stored = self._stored(values)
        self._check_stored(values, stored)
        self._check_read(values, stored)
        if self.use.loaded is not None and self.slot.kind.holds != "derived" and _is_real(self.use.value):
            for scale in SCALES:
                scaled = {origin: _scaled(value, scale) for origin, value in values.items()}
                self._check_loaded(scaled, self._stored(scaled))
        for axis in self.example.sample_axes(self.slot.origin)[:1]:
            self._check_samples(values, stored, axis)
        if self.example.has_sites and (self.use.rows is not None or self.use.whole):
            self._check_edits(values, stored)

    # -- stored and read -------------------------------------------------------------------------

    def _check_stored(self, values: Values, stored: Stored) -> None:
        found, value = stored[self.slot.name], values[self.slot.origin]
        if self.use.loaded is not None:
            said_spec = self.slot.stored_spec(self.use.loaded)
            if _differs(found, self._shape(said_spec, "stored_spec"), said_spec.dtype):
                self._refuse(
                    f"store() makes {form_of(found)} of an example, and stored_spec() says "
                    f"{form_of(self._shape(said_spec, 'stored_spec'), said_spec.dtype)}",
                    "Let stored_spec() say what store() makes; without one, that is what readers get",
                )
        if self.exact:
            right = self.slot.layout.packed.from_dense(value) if self.slot.kind.holds == "packed" else value
            wrong = problem_of(found, right, exact=True)
            if wrong:
                self._refuse(
                    f'it says holds = "{self.slot.kind.holds}", and what store() makes is not that: {wrong}',
                    'Store the value as it is, or say holds = "else", and by rounding how much it rounds',
                )
        recorded = self.slot.recorded(value)
        if _differs(found, tuple(recorded.shape), recorded.dtype):
            self._refuse(f"store() makes {form_of(found)} of an example, and recorded() {form_of(recorded)}")
        self._compare("recorded()", "what store() makes", stored, {**stored, self.slot.name: recorded})

    def _check_read(self, values: Values, stored: Stored) -> None:
        if self.use.loaded is None:
            return
        found = self._check_loaded(values, stored)
        read = self.slot.read(stored[self.slot.name], stored)
        if wrong := self._problem(found, read, dtype=read.dtype):
            self._refuse(f"load() gives readers something else than read() says: {wrong}")
        if self.use.whole and problem_of(found, stored[self.slot.name], exact=True):
            self._refuse(
                "an edit computes the slot anew, in the form that readers get, and the kind stores another",
                "Have the rewrite ask for a kind that stores what readers get",
            )
        pinned, value = self.slot.pinned(values[self.slot.origin]), values[self.slot.origin]
        if _differs(pinned, tuple(value.shape), value.dtype):
            self._refuse(f"pinned() gives {form_of(pinned)} of {form_of(value)}, and must give a value like it")
        if (right := self._as_read(pinned, found)) is not None and (wrong := self._problem(found, right)):
            self._refuse(f"load() gives readers something else than pinned() says: {wrong}")

    def _check_loaded(self, values: Values, stored: Stored) -> Tensor:
        """What readers get, after a look at whether it is what they are to get."""
        use = self.use
        assert use.loaded is not None
        found = self._load(use, use.loaded, stored)
        if _differs(found, self.example.shape(use.loaded), use.loaded.dtype):
            due = form_of(self.example.shape(use.loaded), use.loaded.dtype)
            self._refuse(f"load() gives {form_of(found)} where readers are to get {due}")
        right = self._as_read(values[use.slot.origin], found)
        if right is None:
            return found
        rounding = use.slot.kind.rounding
        if wrong := problem_of(found, right, rounding=rounding, exact=self.exact):
            self._refuse(
                f"load() does not give back what store() took, up to rounding = {rounding:g}: {wrong}",
                "Mend the two, or say as rounding how large an error readers get; a kind whose readers get something "
                'else than the value says holds = "derived"',
            )
        return found

    def _as_read(self, value: Tensor, found: Tensor) -> Tensor | None:
        """A dense value in the form that readers get it in; ``None`` if they get something else."""
        if self.slot.kind.holds == "derived":
            return None
        forms = [self.slot.layout.packed.from_dense(value)] if self.slot.layout.is_rows else []
        return next((form for form in (*forms, value) if form.shape == found.shape), None)

    # -- samples ---------------------------------------------------------------------------------

    def _check_samples(self, values: Values, stored: Stored, axis: int) -> None:
        answer = self.slot.batch_axes(axis)
        if answer is None:
            return
        in_value, in_rows = answer
        written = self.use.rows is not None and self.knows_rows
        turn = self.example.turn(0)
        after = self.example.edited(values, turn) if written else values
        rows = self._rows(after, stored, turn) if written else None
        for number in range(SAMPLES):
            own = self.example.sample(values, number)
            alone = self._stored(own)
            cut = self._sample("what is stored", stored[self.slot.name], in_value, number, alone[self.slot.name])
            self._compare("batch_axes()", f"sample {number}", {**alone, self.slot.name: cut}, alone)
            if self.use.whole:
                cut = self._sample("what edits store", stored[self.slot.name], in_rows, number, alone[self.slot.name])
                self._compare("batch_axes()", f"sample {number}", {**alone, self.slot.name: cut}, alone)
            if rows is not None:
                own_rows = self._rows(self.example.sample(after, number), alone, turn)
                cut = self._sample("rows", rows[self.slot.name], in_rows, number, own_rows[self.slot.name])
                cut_rows = {**own_rows, self.slot.name: cut}
                both = [self._after({}, alone, alone, Edit(turn, alone, each))[1] for each in (cut_rows, own_rows)]
                self._compare("batch_axes()", f"of rows, sample {number}", *both)

    def _sample(self, what: str, whole: Tensor, axis: int | None, number: int, alone: Tensor) -> Tensor:
        """A sample of a tensor, which has the shape of the one that is stored of that sample alone."""
        if axis is not None and not -whole.dim() <= axis < whole.dim():
            self._refuse(f"batch_axes() gives axis {axis} for {what}, which is {form_of(whole)}")
        cut = whole if axis is None else part(whole, axis, number)
        if _differs(cut, tuple(alone.shape), alone.dtype):
            place = "no axis" if axis is None else f"axis {axis}"
            self._refuse(
                f"batch_axes() says that {place} of {what} counts the samples: one of {form_of(whole)} would be "
                f"{form_of(cut)}, and of one sample alone it is {form_of(alone)}"
            )
        return cut

    # -- edits -----------------------------------------------------------------------------------

    def _check_edits(self, values: Values, root: Stored) -> None:
        before, known = root, dict[str, Written]()
        expected = {use.slot.name: use.slot.recorded(values[use.slot.origin]) for use in self.order}
        for number, what in enumerate(("an edit", "an edit of an edit")):
            turn = self.example.turn(number)
            after = self.example.edited(values, turn)
            updates = self._rows(after, before, turn)
            known, before = self._after(known, root, before, Edit(turn, before, updates))
            for use in self.order:
                if use.slot.name in updates:
                    origin = use.slot.origin
                    expected[use.slot.name] = use.slot.edited(values[origin], after[origin])
            found, right = before[self.slot.name], expected[self.slot.name]
            if _differs(found, tuple(right.shape), right.dtype):
                self._refuse(f"after {what} written() gives {form_of(found)} where {form_of(right)} is due")
            if not self.knows_rows:
                return
            methods = "store_rows(), row_form() and written()"
            self._compare("store()", f"after {what}, by {methods}, what is stored", before, expected)
            values = after

    def _rows(self, values: Values, before: Stored, turn: Turn) -> Stored:
        """What an edit gives of the slots that it changes."""
        whole = self._stored(values) if any(use.whole for use in self.order) else {}
        updates: Stored = {}
        for use in self.order:
            if use.whole:
                updates[use.slot.name] = whole[use.slot.name]
            elif use.rows is not None:
                updates[use.slot.name] = self._stored_rows(use, values, before, turn)
        return updates

    def _stored_rows(self, use: Use, values: Values, before: Stored, turn: Turn) -> Tensor:
        assert use.rows is not None
        rows = self.example.rows(use, values, turn)
        if rows is None:
            rows = self.example.random(self.example.shape(use.rows), use.rows.dtype)
        readers = {
            other.slot.name: self._load(other, other.loaded, before)
            for other in self.order
            if other is not use and other.loaded is not None
        }
        found = self._computed(use, "store_rows", rows, use.rows, readers)
        form, stored = use.slot.row_form(), before[use.slot.name]
        if form.level != use.slot.layout.level:
            refuse(
                use.slot, f"row_form() names level {form.level}, and the slot's sites are of {use.slot.layout.level}"
            )
        try:
            due = form.gather(stored, turn.sites[form.level])
        except Exception as error:
            refuse(use.slot, f"row_form() fits no rows of what is stored, {form_of(stored)}: {said(error)}", error)
        if _differs(found, tuple(due.shape), due.dtype):
            refuse(
                use.slot,
                f"store_rows() makes {form_of(found)} of the rows of an edit, and by row_form() those of what store() "
                f"makes are {form_of(due)}",
                remedy="Let store_rows() make of rows what store() makes of a value, and row_form() say where they lie",
            )
        return found

    def _after(
        self, known: Mapping[str, Written], root: Stored, before: Stored, edit: Edit
    ) -> tuple[dict[str, Written], Stored]:
        """What edits wrote, and what is stored, after one more."""
        written, after = dict(known), dict(before)
        for use in self.order:
            name = use.slot.name
            if use.whole:
                after[name] = edit.updates[name]
            elif name in edit.updates:
                written[name] = use.slot.written(known.get(name), edit)
                try:
                    after[name] = written[name].over(root[name])
                except Exception as error:
                    refuse(use.slot, f"what written() gave cannot be put over what is stored: {said(error)}", error)
        return written, after

    # -- computing and comparing -----------------------------------------------------------------

    def _stored(self, values: Values) -> Stored:
        found: Stored = {}
        for use in self.order:
            found[use.slot.name] = self._computed(use, "store", values[use.slot.origin], use.value, found)
        return found

    def _computed(self, use: Use, method: str, value: Tensor, spec: ValueSpec, others: Stored) -> Tensor:
        """What the graph that a method makes of one value computes."""
        graph = fx.Graph()
        node = graph.placeholder("value")
        node.meta.update(spec=spec, varies=True, origin=use.slot.origin)
        if method == "store":
            node.meta["layout"] = use.slot.layout
        nodes = {name: graph.placeholder(f"other_{number}") for number, name in enumerate(others)}
        ask: Callable[..., fx.Node] = getattr(use.slot, method)
        return _run(use.slot, method, graph, ask(graph, node, _asked(nodes)), [value, *others.values()])

    def _load(self, use: Use, loaded: ValueSpec, stored: Stored) -> Tensor:
        graph = fx.Graph()
        slots = {each.slot.name: each.slot for each in self.order}
        nodes = {name: graph.placeholder(f"slot_{number}") for number, name in enumerate(slots)}

        def load(name: str, spec: ValueSpec) -> fx.Node:
            node = _asked(nodes)(name)
            node.meta.update(spec=slots[name].stored_spec(spec), varies=True, input=SlotInput(name))
            return slots[name].load(graph, node, spec, load)

        return _run(use.slot, "load", graph, load(use.slot.name, loaded), [stored[name] for name in slots])

    def _compare(self, method: str, what: str, found: Stored, right: Stored) -> None:
        """Refuse if readers get something else of what is stored."""
        name = self.slot.name
        wrong = self._problem(self.slot.read(found[name], found), self.slot.read(right[name], right))
        if wrong:
            self._refuse(f"{what} disagrees with {method}: {wrong}")

    def _problem(self, found: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> str:
        if dtype is not None and found.shape == right.shape:
            found = found.to(dtype)
        return problem_of(found, right, rounding=self.slot.kind.rounding, exact=self.exact, loose=True)

    def _shape(self, spec: ValueSpec, method: str) -> tuple[int, ...]:
        try:
            return self.example.shape(spec)
        except NoExample as error:
            self._refuse(f"{method}() gave {spec!r}, which has no size in a call: {error}")

    def _refuse(self, problem: str, remedy: str = REMEDY) -> NoReturn:
        refuse(self.slot, problem, remedy=remedy)


def _asked(nodes: Mapping[str, fx.Node]) -> Callable[[str], fx.Node]:
    def other(name: str) -> fx.Node:
        if name not in nodes:
            raise LookupError(f"slot {name!r} is not the one that this slot is about (Slot.of)")
        return nodes[name]

    return other


def _run(slot: Slot, method: str, graph: fx.Graph, result: fx.Node, tensors: Sequence[Tensor]) -> Tensor:
    """What a graph that a method of a kind made computes."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            refuse(
                slot,
                f"in {method}(), {target_name(node.target)} writes to its argument, so that it would change recordings "
                "and the caller's tensors",
                remedy="What a slot kind makes is functional: call the operation without _",
            )
    graph.output(result)
    interpreter = fx.Interpreter(nn.Module(), graph=graph)
    interpreter.extra_traceback = False
    try:
        found = interpreter.run(*tensors)
    except Exception as error:
        refuse(slot, f"what {method}() makes cannot be computed: {said(error)}", error)
    if not isinstance(found, Tensor):
        refuse(slot, f"{method}() makes a node that gives {type(found).__name__}, which is no tensor")
    return found


def _differs(found: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return tuple(found.shape) != shape or found.dtype != dtype


def _scaled(value: Tensor, scale: float) -> Tensor:
    return (value.double() * scale).to(value.dtype) if value.dtype.is_floating_point else value


def _is_real(spec: ValueSpec) -> bool:
    return spec.dtype.is_floating_point
