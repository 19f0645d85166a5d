"""`patch`: any network's GroupNorms, with their SiLU and time embedding, as fused ops."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from fastdiff.integrations.fused_modules import (
    Fused,
    FusedGroupNorm,
    FusedInstanceNorm,
    FusedLayerNorm,
    FusedOwner,
    FusedSequential,
    fused_class,
    has_functional_norms,
)
from fastdiff.integrations.patch_report import PatchReport, Place
from fastdiff.integrations.recognition import (
    is_silu,
    is_watched,
    learn_activation,
    looks_like_group_norm,
    why_not_group_norm,
)
from fastdiff.integrations.rewriting import rewritten
from fastdiff.integrations.sites import steps_at_sites
from fastdiff.integrations.sources import methods_of
from fastdiff.nn.group_norm_silu import GroupNormSiLU


def patch(module: nn.Module) -> PatchReport:
    """Make every GroupNorm in `module` run as `ops.group_norm_silu`, in place.

    With what stands around it where it is called: a time embedding added in front
    (``h + t[:, :, None, None]``, ``h += t``), scale and shift behind (``* (1 + s) + u``,
    ``torch.addcmul``), and SiLU, whatever it is called. The methods that call a normalization are
    compiled again from their source with these expressions deferred; everything else in them stays
    the author's Python. Where there is no source, or it is not what runs, the normalization runs as
    the op by itself, and the report says so. `F.group_norm`, InstanceNorm without running
    statistics and classes that compute a group normalization count as GroupNorm.

    Parameters, state dicts, the classes that `isinstance` sees and the names of classes stay. Works
    before and after `.to()`, `.half()`, memory formats, deepcopy, DDP and torch.compile. A second
    call changes nothing and reports the same. Only the owner of a normalization fuses it: called by
    anybody else, it computes what it did before. While a hook watches a module that a fused op
    would skip, the original code runs, and the hook fires. torch.fx, TorchScript and ONNX see the
    network as it was.

    Parameters
    ----------
    module
        Any network. Under FSDP, patch before wrapping.

    Returns
    -------
    PatchReport
        Left alone, with the reason: normalizations that are quantized, hooked, under FSDP, of a
        class that computes something else, or part of TorchScript.

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
    >>> report = fastdiff.patch(block)
    >>> report.replaced
    {'0': 'group_norm + silu'}
    >>> torch.allclose(block(x), before, atol=1e-6)
    True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"patch: module is {type(module).__name__}, expected an nn.Module")
    named = dict(module.named_modules())
    sharded = [name for name, m in named.items() if _is_sharded(m)]
    norms, left = [], {}
    for name, m in named.items():
        mixin = _kind(m)
        reason = _reason_to_leave(name, m, mixin, sharded)
        if reason is not None:
            left[name] = reason
        elif mixin is not None:
            if not isinstance(m, Fused):
                m.__class__ = fused_class(mixin, type(m))
            norms.append(m)
        else:
            learn_activation(m)  # before any owner asks for it
    steps: dict[nn.Module, set[str]] = {m: set() for m in norms}
    reasons: dict[str, str] = {}
    for owner in named.values():
        if "forward" not in owner.__dict__:
            _fuse_owner(owner, steps, reasons)
    places = _places(named, steps)
    # A class of one's own may still call F.group_norm, which is then the op.
    return PatchReport(places, {n: why for n, why in left.items() if n not in places}, reasons)


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
        m.__dict__.pop("_fastdiff_ran", None)


def _kind(m: nn.Module) -> type[Fused] | None:
    """What a normalization becomes; None for other modules."""
    if isinstance(m, Fused):
        mixin = type(m)._fastdiff_mixin
        return mixin if issubclass(mixin, FusedGroupNorm) else None
    if isinstance(m, nn.modules.instancenorm._InstanceNorm):
        return FusedInstanceNorm
    if isinstance(m, nn.LayerNorm):
        is_of_images = len(m.normalized_shape) > 1 and not m.elementwise_affine
        return FusedLayerNorm if is_of_images else None
    is_norm = isinstance(m, nn.GroupNorm) or looks_like_group_norm(m)
    return FusedGroupNorm if is_norm else None


def _reason_to_leave(
    name: str, m: nn.Module, mixin: type[Fused] | None, sharded: list[str]
) -> str | None:
    """Why a normalization must stay as it is; None for those to fuse, and for other modules."""
    if isinstance(m, GroupNormSiLU):
        return "fastdiff's own, already fused"
    if isinstance(m, torch.jit.ScriptModule):
        return "TorchScript" if m.original_name.startswith("GroupNorm") else None
    if mixin is None:
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
    if mixin is FusedGroupNorm:
        return why_not_group_norm(m)
    base = nn.LayerNorm if mixin is FusedLayerNorm else nn.modules.instancenorm._InstanceNorm
    if type(m).forward is not base.forward:
        return f"{type(m).__name__} has a forward of its own"
    if getattr(m, "running_mean", None) is not None:
        return "it keeps running statistics: set track_running_stats=False if they are not needed"
    return None


def _is_sharded(m: nn.Module) -> bool:
    return any(
        cls.__name__ in ("FullyShardedDataParallel", "FSDPModule") for cls in type(m).__mro__
    )


def _is_exotic(weight: torch.Tensor | None) -> bool:
    return weight is not None and type(weight) not in (nn.Parameter, torch.Tensor)


def _fuse_owner(
    owner: nn.Module, steps: dict[nn.Module, set[str]], reasons: dict[str, str]
) -> None:
    """Fuse what an owner of normalizations does with them; adds to what each is fused with."""
    cls = type(owner)
    original = cls._fastdiff_original if isinstance(owner, Fused) else cls
    if isinstance(owner, nn.Sequential) and original.forward is nn.Sequential.forward:
        if original.__iter__ is nn.Sequential.__iter__:
            _fuse_sequential(owner, steps)
        return
    norms = frozenset(name for name, m in owner._modules.items() if _holds_norms(m))
    if isinstance(owner, FusedGroupNorm) or not (norms or has_functional_norms(original)):
        return
    found = {f: rewritten(f, norms) for f in methods_of(original).values()}
    if any(r.function is not None for r in found.values()) and not isinstance(owner, Fused):
        owner.__class__ = fused_class(FusedOwner, original, norms)
    for function, result in found.items():
        if result.reason is not None:
            reasons.setdefault(f"{original.__name__}.{function.__name__}", result.reason)
        for m, more in steps_at_sites(owner, function, result):
            steps.setdefault(m, set()).update(more)


def _fuse_sequential(owner: nn.Sequential, steps: dict[nn.Module, set[str]]) -> None:
    children = list(owner._modules.values())
    pairs = [m for m, f in itertools.pairwise(children) if m in steps and is_silu(f)]
    if pairs and not isinstance(owner, Fused):
        owner.__class__ = fused_class(FusedSequential, type(owner))
    for m in pairs:
        steps[m].add("silu")


def _holds_norms(m: nn.Module | None) -> bool:
    """A normalization, a Sequential that begins with one, or a container of these."""
    if isinstance(m, nn.Sequential):
        return _holds_norms(next(iter(m._modules.values()), None))
    if isinstance(m, (nn.ModuleList, nn.ModuleDict)):
        return any(map(_holds_norms, m._modules.values()))
    return isinstance(m, FusedGroupNorm)


def _places(named: dict[str, nn.Module], steps: dict[nn.Module, set[str]]) -> dict[str, Place]:
    places = {}
    for name, m in named.items():
        if m in steps:
            outer = name.rpartition(".")[0]
            while outer and isinstance(named[outer], (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
                outer = outer.rpartition(".")[0]
            owner = m if not isinstance(m, FusedGroupNorm) else named[outer]
            places[name] = Place(m, type(owner).__name__, frozenset(steps[m]))
    return places
