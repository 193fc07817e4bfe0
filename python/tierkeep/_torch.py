"""What torch's own classes need to get a state back without a cast and without a second copy.

torch is never imported here: whoever has a module or an optimizer has imported it.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Collection
from typing import Any

from tierkeep import _saved, _sharded, _types
from tierkeep._rng import Rng
from tierkeep.errors import InvalidError


def copy(live: Any, source: Any) -> None:
    """Copies values of one shape and dtype into a live tensor or array."""
    torch = _types.torch_if_imported()
    if torch is not None and isinstance(live, torch.Tensor):
        if not isinstance(source, torch.Tensor):
            source = torch.from_numpy(source)
        with torch.no_grad():
            live.detach().copy_(source.detach())
        return
    if torch is not None and isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    live[...] = source


def like(live: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Contiguous memory on the CPU of the same form, or of another shape."""
    torch = _types.torch_if_imported()
    size = live.shape if shape is None else shape
    if torch is not None and isinstance(live, torch.Tensor):
        return torch.empty(size, dtype=live.dtype, device="cpu")
    return sys.modules["numpy"].empty(size, dtype=live.dtype)


def device_of(live: Any) -> Any:
    """The device of a tensor that does not lie on the CPU."""
    torch = _types.torch_if_imported()
    if torch is None or not isinstance(live, torch.Tensor) or live.device.type == "cpu":
        return None
    return live.device


def load(live: Any, tree: Any, where: str) -> Any:
    """`live.load_state_dict(tree)`; an exception in it learns where it was."""
    try:
        live.load_state_dict(tree)
        if _is_stateful_loader(live):
            # It makes its iterator now, which draws a random number, and not in the script's `for`:
            # these are put back last.
            live.state_dict()
    except Exception as error:
        error.add_note(f"(while restoring {where})")
        raise
    return live


def _is_stateful_loader(live: Any) -> bool:
    module = sys.modules.get("torchdata.stateful_dataloader")
    return module is not None and isinstance(live, module.StatefulDataLoader)


# -- modules ---------------------------------------------------------------------------------


def module_state(module: Any) -> dict[str, Any]:
    """The live state: its own tensors where the class has torch's `state_dict`."""
    own = getattr(module.state_dict, "__func__", None) is sys.modules["torch"].nn.Module.state_dict
    state: dict[str, Any] = module.state_dict(keep_vars=True) if own else module.state_dict()
    return state


def is_lazy(tensor: Any) -> bool:
    """A parameter that gets its shape at the first forward."""
    parameter = sys.modules["torch"].nn.parameter
    return isinstance(tensor, parameter.UninitializedTensorMixin)


def needs_load_state_dict(module: Any) -> bool:
    """Whether loading is more than filling: hooks, extra state, or a way of its own. Then
    `load_state_dict` is called, with everything in new memory.
    """
    base = sys.modules["torch"].nn.Module
    if getattr(module.load_state_dict, "__func__", None) is not base.load_state_dict:
        return True
    if getattr(module.state_dict, "__func__", None) is not base.state_dict:
        return True
    for part in module.modules():
        hooks = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks")
        if any(_does_something(hook) for name in hooks for hook in _hooks(part, name)):
            return True
        if type(part).get_extra_state is not base.get_extra_state:
            return True
        loader = getattr(part._load_from_state_dict, "__func__", None)
        # torch's own layers override it to read what older versions wrote.
        if loader is not base._load_from_state_dict and not str(
            getattr(loader, "__module__", "")
        ).startswith("torch.nn.modules."):
            return True
    return False


def _hooks(module: Any, name: str) -> list[Any]:
    hooks = getattr(module, name, None) or {}
    return list(hooks.values())


def _does_something(hook: Any) -> bool:
    """FSDP2's only brings its parameters into their parts, which `state_dict()` has just done."""
    inner = getattr(hook, "hook", hook)
    inner = getattr(inner, "func", inner)
    inner = getattr(inner, "__wrapped__", inner)
    module = str(getattr(inner, "__module__", ""))
    return not module.startswith("torch.distributed.fsdp._fully_shard")


def load_module(
    module: Any, state: dict[str, Any], current: dict[str, Any], strict: bool, where: str
) -> Any:
    tree: Any = collections.OrderedDict(state)
    if hasattr(current, "_metadata"):
        # The versions of the layers, by which torch tells an old state from a new one.
        tree._metadata = current._metadata
    try:
        if strict:
            module.load_state_dict(tree)
        else:
            module.load_state_dict(tree, strict=False)
    except Exception as error:
        error.add_note(f"(while restoring {where})")
        raise
    return module


# -- optimizers ------------------------------------------------------------------------------


def loads_by_reference(optimizer: Any) -> bool:
    """torch's own loader takes our tensors as they are, where it does not cast them."""
    base = sys.modules["torch"].optim.Optimizer
    return getattr(optimizer.load_state_dict, "__func__", None) is base.load_state_dict


def optimizer_state(optimizer: Any) -> Any:
    state = optimizer.state_dict()
    return state if isinstance(state, dict) else _types.MISSING


def params_by_index(optimizer: Any) -> dict[int, Any]:
    """The parameters by their index in `state_dict()`."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return dict(enumerate(params))


def is_plain(param: Any) -> bool:
    """Whether it is a whole tensor on the CPU."""
    return param.device.type == "cpu" and _sharded.look(param) is None


def empty_like_param(param: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """New memory where a parameter lies, and cut as it is if it has the same shape."""
    torch = sys.modules["torch"]
    of = getattr(torch, _types.TORCH_DTYPES[dtype])
    if tuple(param.shape) == tuple(shape):
        return _sharded.empty_like(param, of)
    return torch.empty(shape, dtype=of, device=param.device)


def dtype_name(tensor: Any) -> str:
    """Its dtype as in safetensors."""
    name = str(tensor.dtype).removeprefix("torch.")
    return next((known for known, of in _types.TORCH_DTYPES.items() if of == name), name)


def to_bytes(tensor: Any) -> bytes:
    """Those of a contiguous tensor or array on the CPU."""
    torch = _types.torch_if_imported()
    if torch is not None and isinstance(tensor, torch.Tensor):
        tensor = tensor.reshape(-1).view(torch.uint8).numpy()
    return bytes(tensor.tobytes())


def groups_differ(tree: Any, live: Any) -> str | None:
    """What differs between the saved groups of parameters and the live ones."""
    if not isinstance(tree, _saved.Mapping):
        return "saved as something else than an optimizer"
    saved = {key: value for key, value in tree.entries if isinstance(key, str)}
    groups = saved.get("param_groups")
    if not loads_by_reference(live):
        return None
    if type(groups) is not list or "state" not in saved:
        return "saved as something else than an optimizer"
    sizes = []
    for group in groups:
        entries = dict(group.entries) if isinstance(group, _saved.Mapping) else {}
        params = entries.get("params")
        sizes.append(len(params) if type(params) is list else -1)
    now = [len(group["params"]) for group in live.param_groups]
    if sizes == now:
        return None
    return f"saved with groups of {sizes} parameters, in the state {now}"


def object_differs(saved: Any, live: Any, now: Any) -> str | None:
    """Why what was saved is no state of `live`, whose is `now`, as far as can be told beforehand.

    An object may have any tree as its state. Schedulers take over whatever they are given, and then
    go wrong in training.
    """
    tree = saved.tree if isinstance(saved, _saved.Object) else saved
    if tree is saved and not isinstance(saved, _saved.Mapping):
        return f"saved as {_saved.kind(saved)}, an object with state_dict in the state"
    keys = {key for key, _ in tree.entries} if isinstance(tree, _saved.Mapping) else set()
    schedulers = sys.modules.get("torch.optim.lr_scheduler")
    is_scheduler = schedulers is not None and isinstance(live, schedulers.LRScheduler)
    if is_scheduler and "last_epoch" in now and "last_epoch" not in keys:
        return "saved as something else than a scheduler"
    if isinstance(live, Rng) and "python" not in keys:
        return "saved as something else than random numbers"
    return None


def names_differ(tree: Any, params: Collection[Any]) -> str | None:
    """What differs between the saved groups and those of an optimizer that names `params`."""
    keys = {key for key, _ in tree.entries} if isinstance(tree, _saved.Mapping) else set()
    if not {"state", "param_groups"} <= keys:
        return "saved as something else than an optimizer"
    if params and any(isinstance(name, int) for name in in_groups(tree) - set(params)):
        return (
            "saved by the order of its parameters, in the state by their names "
            "(restore into the optimizer itself once, then save by name)"
        )
    return None


def in_groups(tree: _saved.Mapping) -> set[Any]:
    """The parameters that the groups of an optimizer name."""
    groups = dict(row for row in tree.entries if isinstance(row[0], str)).get("param_groups")
    rows = [row for group in _here(groups) or () for row in getattr(_here(group), "entries", ())]
    return {_here(name) for key, names in rows if key == "params" for name in _here(names)}


def _here(saved: Any) -> Any:
    """What is saved there, also where only other ranks have the place."""
    return saved.tree if isinstance(saved, _saved.Foreign) else saved


def load_optimizer(optimizer: Any, tree: Any, where: str) -> Any:
    """Loads, then puts back what the loader cast to the parameters' dtype."""
    load(optimizer, tree, where)
    mended = _mend(optimizer, tree)
    if mended is not None:
        raise InvalidError(f"{where}/{mended}: the optimizer's load_state_dict changed its dtype")
    return optimizer


def _mend(optimizer: Any, tree: dict[str, Any]) -> str | None:
    """Returns the path of something that could not be mended."""
    torch = sys.modules["torch"]
    saved = tree.get("state")
    groups = tree.get("param_groups")
    state = getattr(optimizer, "state", None)
    if not isinstance(saved, dict) or not isinstance(groups, list) or not isinstance(state, dict):
        return None
    indices = [index for group in groups for index in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    whole = loads_by_reference(optimizer)
    for index, param in zip(indices, params, strict=True):
        if index not in saved or param not in state:
            continue
        ours, theirs = saved[index], state[param]
        if not isinstance(ours, dict) or not isinstance(theirs, dict):
            continue
        for name, value in ours.items():
            if name in theirs:
                theirs[name] = _uncast(value, theirs[name], whole, torch)
                if _is_cast(value, theirs[name], torch):
                    return f"state/{index}/{name}"
    return None


def _uncast(ours: Any, theirs: Any, whole: bool, torch: Any) -> Any:
    """Our value on their device. `whole`: torch's loader, which spoils strs and NamedTuples too."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if ours.dtype == theirs.dtype or ours.shape != theirs.shape:
            return theirs
        return ours.to(device=theirs.device)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name, value in ours.items():
            if name in theirs:
                theirs[name] = _uncast(value, theirs[name], whole, torch)
        return theirs
    if not whole:
        return theirs
    if type(ours) in (list, tuple) and type(theirs) is type(ours) and len(ours) == len(theirs):
        return type(ours)(_uncast(a, b, whole, torch) for a, b in zip(ours, theirs, strict=True))
    return ours


def _is_cast(ours: Any, theirs: Any, torch: Any) -> bool:
    tensors = isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
    return tensors and ours.dtype != theirs.dtype and ours.shape == theirs.shape
