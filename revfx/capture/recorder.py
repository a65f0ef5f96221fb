"""Records a forward as an fx graph: it runs once on fake tensors, which have shapes and strides but no data.

Sub-modules stay whole unless they are named in `opened`. Unlike symbolic tracing with proxies the user's code sees
tensors: shapes are numbers, in-place operators stay in place, chunks can be iterated, and code that asks for a value
that is not there says so. Python code of what is opened runs at capture and not afterwards, so whatever it would leave
behind (attributes, hooks, draws from Python's generator) makes it untraceable, and what it read is part of the key.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from revfx import _fake, _torch
from revfx.ambient import Ambience, drew, generators, restore, where, where_raised
from revfx.capture.constants import Constants, Numbers, positions
from revfx.capture.data import Capture, Carried, Spot, carried, where_held
from revfx.capture.effects import Snapshot, lasts, left_alone
from revfx.capture.guards import AttributeReads
from revfx.capture.inplace import functionalise, set_item
from revfx.capture.memo import Seen, structure
from revfx.capture.untraceable import ASKS, EFFECTS, GIVEN, KEPT, OWN_GENERATOR, Untraceable
from revfx.capture.whole import faked, refuse_hidden, shapes_of
from revfx.eager import dtensor
from revfx.eager.calls import meta, tensors
from revfx.errors import Cause, Reason
from revfx.passes._torch import updated_statistics
from revfx.passes.sizes import of_its_shape
from revfx.rules import has_rule, op_name


class Recorder(TorchFunctionMode):
    def __init__(self, root: nn.Module, opened: frozenset[str], carried: frozenset[Spot]) -> None:
        super().__init__()
        self.opened = opened
        self.graph = fx.Graph()
        self.fake = _fake.FakeMode()
        self.paths = {id(module): path for path, module in root.named_modules(remove_duplicate=True)}
        self.real, self.tied = where_held(root)
        self.numbers = Numbers()
        for path, name in carried:
            module = root.get_submodule(path)
            t = self.numbers.of[id(module), name] = torch.tensor(getattr(module, name), dtype=torch.float64)
            self.numbers.known.add(id(t))
            self.real[id(t)] = t, path, name
        self.fakes: dict[int, Tensor] = {}
        self.written = set[tuple[type, str]]()
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []
        self.attributes: dict[fx.Node, tuple[str, str]] = {}
        self.constants = Constants(self.graph)
        self.demanded: list[Tensor] = []
        self.given: tuple[str, set[int]] | None = None  # a module that is called whole, and the tensors it is given
        self.sets: dict[Spot, Tensor] = {}  # attributes that the forward sets, by where they hang
        self.suspended = 0  # above that the code that runs is that of a module called whole, and not recorded
        self.drew: str | None = None  # the generator from which the latest call that was not recorded drew
        self.generation: dict[int, int] = {}
        self.born: dict[int, int] = {}  # when memory was first seen, counted in such
        self.hooked: tuple[int, str] = (-1, "")  # the latest module with hooks, and when its call ended
        self.inputs: list[int] = []
        self.memo: dict[Any, Seen | None] = {}
        self.ambient = Ambience.now()
        self.stack: list[str] = [""]
        self.made: dict[int, nn.Module] = {}  # modules that the forward itself makes
        self.computed_in = dtensor.computed_in(root.modules())
        self.lasting = {id(v) for m in root.modules() for v in vars(m).values()}  # objects that it does not

    # --- inputs, attributes and results
    def fake_inputs(self, tree: Any) -> Any:
        with _torch.no_torch_function():
            leaves, spec = pytree.tree_flatten(tree)
            self.lasting.update(map(id, leaves))
            given = {id(x) for x in leaves}  # they are inputs, though a container of the model's may hold them, too
            self.real = {i: held for i, held in self.real.items() if i not in given or held[2].isidentifier()}
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    known = id(leaf) in self.fakes
                    leaves[i] = self.to_fake(leaf)
                    if not known and id(leaf) not in self.real:
                        self._name(self.graph.placeholder(f"input_{len(self.inputs)}"), leaves[i])
                        self.inputs.append(i)
            return pytree.tree_unflatten(leaves, spec)

    def to_fake(self, t: Tensor) -> Tensor:
        if _torch.is_fake(t):
            return t
        fake = self.fakes.get(id(t))
        if fake is None:
            self.alive.append(t)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it looks at `.grad`, which warns for tensors that are not leaves
                fake = self.fakes[id(t)] = _fake.to_fake(self.fake, t, self.computed_in.get(id(t)))
        return fake

    def convert(self, tree: Any) -> Any:
        """Return `tree` with every real tensor replaced by its fake."""
        if isinstance(tree, Tensor):
            fake = self.to_fake(tree)
            if fake is not tree and id(fake) not in self.nodes and not self.suspended:
                self._attribute(tree, fake)
            return fake
        if isinstance(tree, (list, tuple)) and any(isinstance(x, (Tensor, list, tuple, dict, slice)) for x in tree):
            items = [self.convert(x) for x in tree]
            return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
        if isinstance(tree, dict) and tree:
            items = {k: self.convert(v) for k, v in tree.items()}
            if type(tree) is dict or any(items[k] is not v for k, v in tree.items()):
                return items
        return tree  # a dict of another class, such as what a Hugging Face model returns, stays what it is

    def _attribute(self, t: Tensor, fake: Tensor) -> None:
        known = self.real.get(id(t))
        if known is None:
            raise Untraceable(
                "it reads a tensor that is neither an argument nor a parameter, buffer or attribute of the model (a"
                " global, or one kept in a container or in an object that it is given)",
                kind=Reason.HIDDEN_STATE,
            )
        _, path, name = known
        qualified = f"{path}.{name}" if path else name
        first = next((n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")), None)
        # ahead of all others: attributes are sources in the graph
        with nullcontext() if first is None else self.graph.inserting_before(first):
            node = self.graph.create_node("get_attr", qualified, (), {}, name=qualified.replace(".", "_"))
        if id(t) in self.numbers.known:
            self.numbers.known.add(id(fake))
        else:
            self.constants.hold(node, t)
        self._name(node, fake)
        self.attributes[node] = path, name

    def _name(self, node: fx.Node, fake: Tensor) -> None:
        key = _torch.storage_key(fake) if fake.layout == torch.strided else id(fake)
        node.meta.update(val=fake, storage=(key, self.generation.get(key, 0)), where=node.meta.get("where", ""))
        if fake.layout == torch.strided:
            node.meta["storage_nbytes"] = fake.untyped_storage().nbytes()
        self.nodes[id(fake)] = node
        self.born.setdefault(key, len(self.born) if node.op.startswith("call") else -1)
        self.alive.append(fake)

    def finish(self, result: Any, reads: AttributeReads) -> Capture:
        """Return the capture, once the forward has returned `result`."""
        leaves, spec = pytree.tree_flatten(result)
        outputs: list[Any] = []
        for leaf in (*leaves, *self.demanded, *self.sets.values()):
            if isinstance(leaf, Tensor):
                outputs.append(self._node(self.convert(leaf)))
            else:
                outputs.append(carried(leaf, lambda t: self._node(self.convert(t)), self.lasting))
        self._refuse_unseen_functions()
        self.graph.output(tuple(o.tensors if isinstance(o, Carried) else o for o in outputs))
        functionalise(self.graph)
        self.constants.fold_all()
        self.graph.lint()
        read = set(self.attributes.values())
        tied = tuple(pair for pair in self.tied if pair[1] in read)
        sources = tuple(self.inputs), tuple(outputs), spec, self.attributes, tied
        return Capture(self.graph, *sources, tuple(self.sets), frozenset(self.written), reads)

    def _refuse_unseen_functions(self) -> None:
        for t in self.alive:
            node = self.nodes.get(id(t)) if isinstance(t, Tensor) and _torch.ran_unseen(t) else None
            while node is not None and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
                node = node.args[0]
            if node is not None and node.op in ("call_function", "call_method") and not node.meta.get("opaque"):
                raise Untraceable("it calls an autograd function's `apply` that was looked up before the forward ran")

    def _node(self, fake: Tensor) -> fx.Node:
        node = self.nodes.get(id(fake))
        if node is None:
            raise Untraceable("it uses a tensor made by something that can't be recorded")
        return node

    # --- recording
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.convert(args), self.convert(kwargs or {})
        if self.suspended:
            refuse_hidden(self, (args, kwargs))
            out = func(*args, **kwargs)
            self.drew = OWN_GENERATOR if _draws((args, kwargs)) else self.drew
            return out
        name = op_name(func)
        if name in EFFECTS:
            text = f"its forward calls `{name}`, whose effect a recorded graph would not repeat"
            raise Untraceable(text, once=True, kind=Reason.SIDE_EFFECT)
        if name in ("__getitem__", "__setitem__"):
            args = args[0], positions(args[1], self.nodes, self.__torch_function__), *args[2:]
        if name == "_is_all_true":  # a distribution validates what it is given: a run asks this at its end
            self.demanded.append(self.record("call_function", func, args, kwargs, func(*args, **kwargs), []))
            return True
        if name == "__get__":
            given = args[0], func.__self__.__name__
            return self.record("call_function", getattr, given, {}, func(*args, **kwargs), [])
        method = getattr(torch.Tensor, name, None) == func
        if name == "__setitem__":
            func, method = set_item, False
        versions = [(t, _torch.version(t)) for t in tensors((args, kwargs))]
        asks: Any = RuntimeError if name == "tolist" else _fake.DATA_DEPENDENT
        try:
            out = func(*args, **kwargs)
        except asks:
            found = self.constants.asked(func, *self._to_nodes((args, kwargs)))
            out = pytree.tree_map_only(Tensor, self.to_fake, found)
        mutated = [t for t, v in versions if _torch.version(t) != v]
        mutated += updated_statistics(name, args, kwargs)
        if self.numbers.of:
            self.numbers.follow(name, tensors((args, kwargs)), tensors(out))
        kind, target = ("call_method", name) if method else ("call_function", func)
        if _torch.is_plain(out) and (told := of_its_shape(name, args, kwargs, out)) is not None:
            kind, target, args, kwargs = "call_function", getattr(torch, told[0]), told[1], told[2]
        return self.record(kind, target, args, kwargs, out, mutated)

    def record(
        self, kind: str, target: Any, args: Any, kwargs: Any, out: Any, mutated: list[Tensor], **meta: Any
    ) -> Any:
        """Return `out`, after adding the node that makes it (unless it makes no tensor and changes none)."""
        if not mutated and not meta.get("opaque") and all(id(t) in self.nodes for t in tensors(out)):
            return out
        node_args, node_kwargs = self._to_nodes(args), self._to_nodes(kwargs)
        node = self.graph.create_node(kind, target, node_args, node_kwargs)
        node.meta.update(meta, where=where(), scope=self.stack[-1])
        if (ambient := Ambience.now()) != self.ambient:
            node.meta["ambient"] = ambient
        if (drawn := OWN_GENERATOR if _draws((args, kwargs)) else meta.get("drew")) is not None:
            node.meta["barrier"] = Cause(Reason.HIDDEN_STATE, f"it draws from {drawn}, whose state is not tracked")
        if mutated:
            node.meta["mutates"] = [self.nodes[id(t)] for t in mutated if id(t) in self.nodes]
            node.meta["unseen"] = not torch.is_grad_enabled() and any(t.requires_grad for t in mutated)
            then, path = self.hooked  # hooks, which don't run here, may have replaced it by any tensor that was there
            if any(self.born[n.meta["storage"][0]] < then for n in node.meta["mutates"]):
                text = f"it writes in place to what may be the result of `{path}`, which hooks may replace"
                raise Untraceable(text, kind=Reason.WRITES_IN_PLACE)
            for t in mutated:
                key = _torch.storage_key(t)
                self.generation[key] = self.generation.get(key, 0) + 1
                self.constants.forget(key)
        if isinstance(out, Tensor):
            self._name(node, out)
        else:
            node.meta["val"] = out
            self.alive.append(out)
        self.constants.fold(node)
        if not isinstance(out, Tensor):
            self._take_apart(node, out)
        return out

    def _take_apart(self, node: fx.Node, out: Any) -> None:
        items = enumerate(out) if isinstance(out, (tuple, list)) else out.items() if isinstance(out, dict) else ()
        for key, item in items:
            if not isinstance(item, (Tensor, tuple, list, dict)):
                continue
            part = self.graph.call_function(operator.getitem, (node, key))
            part.meta["where"] = node.meta["where"]
            part.meta["val"] = item
            if not isinstance(item, Tensor):
                self._take_apart(part, item)
            elif id(item) in self.nodes:
                part.meta["storage"] = self.nodes[id(item)].meta["storage"]
            else:
                self._name(part, item)
                self.constants.fold(part)

    def _to_nodes(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._node(tree)
        if isinstance(tree, (list, tuple)):
            items = [self._to_nodes(x) for x in tree]
            return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
        if type(tree) in (dict, OrderedDict):
            return {k: self._to_nodes(v) for k, v in tree.items()}
        if isinstance(tree, slice):
            return slice(*(self._to_nodes(x) for x in (tree.start, tree.stop, tree.step)))
        if not lasts(tree, self.lasting):
            raise Untraceable(f"it passes on a {type(tree).__name__} that it made, {KEPT}")
        return tree

    # --- calls of sub-modules and autograd functions
    def call_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.suspended:
            return dtensor.run(module, args, kwargs)
        path = self.paths.get(id(module))
        if path is None and id(module) in self.made and type(module).__module__.startswith("torch."):
            return module.forward(*args, **kwargs)  # `CrossEntropyLoss()(x, y)`: what it does is this code's choice
        if path is None:
            text = f"it calls a {type(module).__name__} that is not registered as a sub-module"
            raise Untraceable(text, kind=Reason.HIDDEN_STATE)
        if path in self.opened:
            self.stack.append(path)
            out = module.forward(*args, **kwargs)
            self.stack.pop()  # not in a finally: after an error it tells where it happened
            return out
        with _torch.no_torch_function():
            args, kwargs = self.convert(args), self.convert(kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            made = next((x for x in leaves if not isinstance(x, Tensor) and not lasts(x, self.lasting)), None)
            if made is not None:
                raise Untraceable(f"`{path}` is given a {type(made).__name__} that its caller made, {KEPT}", opens=path)
            hooked = any(map(_torch.hooks, module.modules()))
            key = (structure(module), hooked, str(spec), tuple(map(meta, leaves)), Ambience.now())
            versions = [(t, _torch.version(t)) for t in leaves if isinstance(t, Tensor)]
            seen = self.memo.get(key)
            out = None if seen is None else seen.fresh()
        if seen is None:
            spoilt = Untraceable(f"`{path}` {GIVEN}", opens=path, kind=Reason.SIDE_EFFECT)
            with left_alone((args, kwargs), spoilt):
                out = self._run_whole(path, module, args, kwargs)
        with _torch.no_torch_function():
            mutated = [t for t, v in versions if _torch.version(t) != v]
            if seen is None and not mutated:
                self.memo[key] = Seen.of(out, [t for t, _ in versions], self.drew)
            ref, drawn = weakref.ref(module), self.drew if seen is None else seen.drew
            out = self.record("call_module", path, args, kwargs, out, mutated, opaque=True, module=ref, drew=drawn)
            self.hooked = (len(self.born), path) if hooked else self.hooked
            return out

    def _run_whole(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return what `module` returns, as fakes; what its Python code leaves behind is undone."""
        before, drawn, self.drew = Snapshot([*module.modules()]), generators(), None
        given = tensors((args, kwargs))
        self.suspended += 1
        self.given = path, {id(t) for t in given}
        try:
            try:
                out = dtensor.run(module, args, kwargs)
            except _fake.DATA_DEPENDENT as e:
                if not has_rule(type(module)):  # its own code may ask a buffer
                    raise Untraceable(ASKS, where_raised(e), opens=path, kind=Reason.DATA_DEPENDENT) from None
                out = faked(self, shapes_of(module, args, kwargs), [*given, *module.parameters()])
            with _torch.no_torch_function():
                odd = [type(x).__name__ for x in pytree.tree_leaves(out) if not isinstance(x, (Tensor, type(None)))]
                if odd:
                    text = f"`{path}` returns something other than tensors in tuples, lists or dicts: {odd[0]}"
                    raise Untraceable(text, opens=path)
                return self.convert(out)
        finally:
            self.suspended, self.given = self.suspended - 1, None
            self.drew = drew(drawn, generators()) or self.drew
            self.written |= before.written()
            before.restore()
            restore(drawn)

    def call_function(
        self, function: type[torch.autograd.Function], apply: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self.suspended:
            return apply(*args, **kwargs)
        with _torch.no_torch_function():
            args, kwargs = self.convert(args), self.convert(kwargs)
            versions = [(t, _torch.version(t)) for t in tensors((args, kwargs))]
        self.suspended, self.drew = self.suspended + 1, None
        try:
            out = apply(*args, **kwargs)
        finally:
            self.suspended -= 1
        with _torch.no_torch_function():
            mutated = [t for t, v in versions if _torch.version(t) != v]
            return self.record("call_function", function.apply, args, kwargs, out, mutated, opaque=True, drew=self.drew)


def _draws(tree: Any) -> bool:
    return any(isinstance(x, torch.Generator) for x in pytree.tree_leaves(tree))
