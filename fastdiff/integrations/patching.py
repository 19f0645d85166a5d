"""`patch`: any network's GroupNorms, with their SiLU and time embedding, as fused ops."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff._backends import use_backend
from fastdiff.integrations.fused_modules import (
    KNOWN_NAMES,
    SILU_CLASSES,
    Fused,
    FusedGroupNorm,
    FusedResBlock,
    FusedResnetBlock2D,
    FusedSequential,
    PairedOwner,
    fused_class,
    is_pair,
    is_watched,
)
from fastdiff.integrations.pair_calls import methods_of, pairs_in
from fastdiff.nn.group_norm_silu import GroupNormSiLU


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did: the state of every normalization after the call, by qualified name."""

    replaced: dict[str, str]
    """What each fused normalization now computes, e.g. "channel_bias + group_norm + silu"."""
    left: dict[str, str]
    """Why each other one was left alone."""

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  {name}: {what}" for name, what in self.replaced.items()]
        lines += [f"  {name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def patch(module: nn.Module) -> PatchReport:
    """Make every GroupNorm in `module` run as `ops.group_norm_silu`, in place.

    Fused with what follows, where the structure shows it: SiLU behind it in an nn.Sequential, or
    called right after it in a method of its owner (conv_norm_out and conv_act of diffusers'
    networks); diffusers' ResnetBlock2D and the ResBlock of guided- and improved-diffusion with
    their time embedding, added or as scale and shift. All others run as the normalization alone;
    `fastdiff.compile_pass` finds what structure does not show.

    Parameters, state dicts, the classes that `isinstance` sees and the names of classes stay. Works
    before and after `.to()`, `.half()`, memory formats, deepcopy, DDP and torch.compile. A second
    call changes nothing and reports the same. Only the owner of a normalization and an activation
    fuses the two: each of them, called by anybody else, computes what it did before. While a hook
    watches a module that a fused block would skip, the block runs its original code, and the hook
    fires. torch.fx, TorchScript and ONNX see the network as it was.

    Parameters
    ----------
    module
        Any network. Under FSDP, patch before wrapping.

    Returns
    -------
    PatchReport
        Left alone, with the reason: normalizations that are quantized, hooked, under FSDP, of a
        subclass with a forward of its own (GroupNorm32 is known), or part of TorchScript.

    Raises
    ------
    TypeError
        Not an nn.Module.

    Examples
    --------
    >>> import torch, fastdiff
    >>> block = torch.nn.Sequential(torch.nn.GroupNorm(4, 8), torch.nn.SiLU())
    >>> x = torch.randn(2, 8, 4, 4)
    >>> before = block(x)
    >>> print(fastdiff.patch(block))
    1 replaced, 0 left
      0: group_norm + silu
    >>> torch.allclose(block(x), before, atol=1e-6)
    True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"patch: module is {type(module).__name__}, expected an nn.Module")
    named = dict(module.named_modules())
    sharded = [name for name, m in named.items() if _is_sharded(m)]
    replaced, left = {}, {}
    for name, m in named.items():
        reason = _reason_to_leave(name, m, sharded)
        if reason is not None:
            left[name] = reason
        elif isinstance(m, nn.GroupNorm):
            if not isinstance(m, Fused):
                m.__class__ = fused_class(FusedGroupNorm, type(m))
            replaced[name] = "group_norm"
        else:
            _learn_activation(m)  # before any owner asks for it
    for owner_name, owner in named.items():
        if "forward" not in owner.__dict__:
            prefix = f"{owner_name}." if owner_name else ""
            for attribute, what in _fuse_owner(owner).items():
                name = prefix + attribute
                if replaced.get(name) == "group_norm":  # an outer owner knows more than an inner
                    replaced[name] = what
    return PatchReport(replaced, left)


def unpatch(module: nn.Module) -> None:
    """Undo `patch` on `module` and all modules in it.

    Raises
    ------
    TypeError
        Not an nn.Module.
    RuntimeError
        A patched module's class was changed again since (by FSDP or a parametrization, say).
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"unpatch: module is {type(module).__name__}, expected an nn.Module")
    for name, m in module.named_modules():
        if not isinstance(m, Fused):
            continue
        if "_fastdiff_original" not in type(m).__dict__:
            raise RuntimeError(
                f"unpatch: {name!r} has become a {type(m).__name__} since it was patched; undo "
                "that first"
            )
        m.__class__ = type(m)._fastdiff_original


def _reason_to_leave(name: str, m: nn.Module, sharded: list[str]) -> str | None:
    """Why a normalization must stay as it is; None for those to fuse, and for other modules."""
    if isinstance(m, GroupNormSiLU):
        return "fastdiff's own, already fused"
    if isinstance(m, torch.jit.ScriptModule):
        return "TorchScript" if m.original_name.startswith("GroupNorm") else None
    if not isinstance(m, nn.GroupNorm):
        return None
    if any(name == outer or not outer or name.startswith(f"{outer}.") for outer in sharded):
        return "under FSDP, which may hold its parameters back: patch before wrapping"
    weight = m._parameters.get("weight")
    if "quantized" in type(m).__module__ or hasattr(m, "qconfig") or _is_exotic(weight):
        return "quantized, or its parameters are not plain tensors"
    if isinstance(m, Fused):
        return None
    if type(m).__call__ is not nn.Module.__call__:
        return f"{type(m).__name__} has a __call__ of its own"
    if is_watched(m):
        return "hooks or a forward of its own on the instance"
    if not m.eps > 0:
        return f"eps = {m.eps}"
    if type(m).forward is not nn.GroupNorm.forward and not _only_casts(type(m).forward):
        return f"{type(m).__name__} has a forward of its own"
    return None


def _is_sharded(m: nn.Module) -> bool:
    return any(
        cls.__name__ in ("FullyShardedDataParallel", "FSDPModule") for cls in type(m).__mro__
    )


def _is_exotic(weight: torch.Tensor | None) -> bool:
    return weight is not None and type(weight) not in (nn.Parameter, torch.Tensor)


def _only_casts(forward) -> bool:
    """Whether it is GroupNorm32's: normalize in float32, return the dtype of x; as the op does.

    Names, constants and the values of a trial must all be those.
    """
    code = getattr(forward, "__code__", None)
    names = {"super", "forward", "float", "type", "to", "dtype"}
    if code is None or not names.issuperset(code.co_names):
        return False
    if any(isinstance(constant, (int, float)) for constant in code.co_consts):
        return False
    owner = next(
        (c for c in nn.GroupNorm.__subclasses__() if c.__dict__.get("forward") is forward), None
    )
    if owner is None:
        return False
    trial = owner(2, 4)
    x = torch.linspace(-3, 5, 48).reshape(2, 4, 6)
    with torch.no_grad():
        return all(
            torch.equal(trial(x.to(dtype)), nn.GroupNorm(2, 4)(x.to(dtype).float()).to(dtype))
            for dtype in (torch.float32, torch.bfloat16)
        )


def _fuse_owner(owner: nn.Module) -> dict[str, str]:
    """Fuse an owner of normalizations; what they compute now, by name inside it."""
    mixin = type(owner)._fastdiff_mixin if isinstance(owner, Fused) else None
    if mixin is FusedSequential or _iterates_as_sequential(type(owner)):
        return _fuse_sequential(owner)
    if mixin is FusedResnetBlock2D:
        return _fuse_resnet_block(owner)
    if mixin is FusedResBlock:
        return _fuse_res_block(owner)
    done = {}
    if mixin is None and _looks_like_resnet_block(owner):
        done = _fuse_resnet_block(owner)
    elif mixin is None and _looks_like_res_block(owner):
        done = _fuse_res_block(owner)
    return done or _fuse_attributes(owner)


def _iterates_as_sequential(cls: type) -> bool:
    base = nn.Sequential
    return cls.forward is base.forward and cls.__iter__ is base.__iter__


def _learn_activation(m: nn.Module) -> None:
    """Add a class of SiLU's behaviour to those known, as improved-diffusion has its own."""
    cls = type(m)
    if cls in SILU_CLASSES or cls.__name__ not in ("SiLU", "Swish") or m.state_dict():
        return
    # Nothing else than that, and nothing that another instance has otherwise: a factor beta.
    if not _names_only(cls.forward, _SILU_NAMES) or cls.__call__ is not nn.Module.__call__:
        return
    x = torch.linspace(-20, 20, 101)
    with torch.no_grad():
        if torch.allclose(cls.forward(m, x.clone()), F.silu(x), rtol=1e-6, atol=1e-6):
            SILU_CLASSES[cls] = cls.forward


_SILU_NAMES = "torch th nn functional F sigmoid silu inplace mul mul_"


def _names_only(function: object, names: str) -> bool:
    """Whether a method names nothing else: then it has no effect but its result."""
    code = getattr(function, "__code__", None)
    return code is not None and not code.co_freevars and set(names.split()) >= {*code.co_names}


def _fuse_sequential(owner: nn.Sequential) -> dict[str, str]:
    children = itertools.pairwise(owner._modules.items())
    pairs = [name for (name, norm), (_, activation) in children if is_pair(norm, activation)]
    if pairs and not isinstance(owner, Fused):
        owner.__class__ = fused_class(FusedSequential, type(owner))
    return dict.fromkeys(pairs, "group_norm + silu")


def _has(m: nn.Module, *names: str) -> bool:
    return all(hasattr(m, name) for name in names)


def _looks_like_resnet_block(m: nn.Module) -> bool:
    layers = "norm1", "conv1", "time_emb_proj", "norm2", "dropout", "conv2", "nonlinearity"
    rest = "upsample", "downsample", "conv_shortcut", "time_embedding_norm", "skip_time_act"
    if not _has(m, *layers, *rest, "output_scale_factor"):
        return False
    return m.time_emb_proj is None or m.time_embedding_norm in ("default", "scale_shift")


def _fuse_resnet_block(m: nn.Module) -> dict[str, str]:
    if not is_pair(m.norm1, m.nonlinearity) or not is_pair(m.norm2, m.nonlinearity):
        return {}
    if not isinstance(m, Fused):
        time = None if m.time_emb_proj is None else m.time_emb_proj.in_features
        if not _computes_the_same(m, FusedResnetBlock2D, m.norm1.num_channels, time, 2):
            return {}
        m.__class__ = fused_class(FusedResnetBlock2D, type(m))
    second = "group_norm + silu"
    if m.time_emb_proj is not None:
        second = _with_time(m.time_embedding_norm == "scale_shift")
    return {"norm1": "group_norm + silu", "norm2": second}


def _with_time(scale_shift: bool) -> str:
    return "group_norm + scale_shift + silu" if scale_shift else "channel_bias + group_norm + silu"


def _looks_like_res_block(m: nn.Module) -> bool:
    sequentials = "in_layers", "emb_layers", "out_layers"
    if not _has(m, *sequentials, "skip_connection", "use_scale_shift_norm", "_forward"):
        return False
    return all(isinstance(getattr(m, name), nn.Sequential) for name in sequentials)


def _fuse_res_block(m: nn.Module) -> dict[str, str]:
    if len(m.out_layers) < 2 or not is_pair(m.out_layers[0], m.out_layers[1]):
        return {}
    if not isinstance(m, Fused):
        channels, dims = m.in_layers[0].num_channels, m.in_layers[-1].weight.dim() - 2
        if not _computes_the_same(m, FusedResBlock, channels, m.emb_layers[-1].in_features, dims):
            return {}
        m.__class__ = fused_class(FusedResBlock, type(m))
    return {"out_layers.0": _with_time(m.use_scale_shift_norm)}


_verdicts: dict[tuple, bool] = {}


def _computes_the_same(
    block: nn.Module, mixin: type, channels: int, time_channels: int | None, dims: int
) -> bool:
    """Whether the fused forward is the block's, tried on a copy with random weights: whatever the
    version of the project that the block comes from. A forward that does more, in a subclass say,
    gives itself away by what it names.

    One trial serves all blocks of a class with the same settings.
    """
    method = next(name for name in ("_forward", "forward") if name in vars(mixin))
    function = getattr(type(block), method)
    if not _names_only(function, KNOWN_NAMES[mixin]):
        return False
    settings = {k: v for k, v in block.__dict__.items() if isinstance(v, (bool, str, float))}
    settings.pop("training", None)
    absent = tuple(k for k, v in block._modules.items() if v is None)
    key = (type(block), function, mixin, tuple(sorted(settings.items())), absent, dims)
    if key not in _verdicts:
        # On the reference, in float32, whatever the caller works with.
        with torch.no_grad(), torch.autocast("cpu", enabled=False), use_backend("reference"):
            _verdicts[key] = _trial(block, mixin, (2, channels, *[8] * dims), time_channels)
    return _verdicts[key]


def _trial(
    block: nn.Module, mixin: type, shape: tuple[int, ...], time_channels: int | None
) -> bool:
    twin = copy.deepcopy(block).to_empty(device="cpu").float().eval()
    for m in twin.modules():  # what others hooked in is not for a trial
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    for parameter in twin.parameters():
        parameter.copy_(normal(*parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    x, time = normal(*shape), None if time_channels is None else normal(2, time_channels)
    expected = twin(x, time)
    twin.__class__ = fused_class(mixin, type(twin))
    error = (twin(x, time) - expected).abs().max()
    return bool(error <= 1e-4 * expected.abs().max())


def _fuse_attributes(owner: nn.Module) -> dict[str, str]:
    """Pairs of attributes that the owner's methods call one right after the other."""
    children = owner._modules.items()
    norms = [(name, m) for name, m in children if isinstance(m, FusedGroupNorm)]
    activations = [(name, m) for name, m in children if type(m) in SILU_CLASSES]
    candidates = frozenset(
        (norm_name, name)
        for (norm_name, norm), (name, activation) in itertools.product(norms, activations)
        if is_pair(norm, activation)
    )
    if not candidates:
        return {}
    original = type(owner)._fastdiff_original if isinstance(owner, Fused) else type(owner)
    pairs = frozenset().union(*(pairs_in(f, candidates) for f in methods_of(original).values()))
    if pairs and not isinstance(owner, Fused):
        owner.__class__ = fused_class(PairedOwner, original, pairs)
    return {norm: "group_norm + silu" for norm, _ in pairs}
