"""A patched module, whoever calls it, computes what it computed before."""

import copy
import pickle
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

diffusers = pytest.importorskip("diffusers")

from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from integrations.networks import make  # noqa: E402
from integrations.openai_unet import ResBlock  # noqa: E402
from nn.networks import unzero  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.integrations import deferred  # noqa: E402


class Features(nn.Module):
    """Four owners' ways of calling a pair, and methods that use its halves alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(4, 4)
        self.act, self.conv = nn.SiLU(), nn.Conv2d(4, 4, 1)

    def forward(self, x, scale=None, early=False):
        x = self.act(self.norm(x))
        if scale is None:
            h = self.norm2(x)
        else:
            h = self.norm2(x)
            h = h * scale
        h = self.act(h)
        if early:
            h = self.norm(h)
            return self.act(h)
        return self.conv(h)

    def normalized(self, x):
        return self.norm(x)

    def kept(self, x):
        h = self.norm(x)
        y = self.act(h)
        return h, y

    def closed_over(self, x):
        h = self.norm(x)

        def later():
            return h

        h = self.act(h)
        return later(), h

    def after_return(self, x, seen):
        h = x
        try:
            h = self.norm(x)
            return self.act(h)
        finally:
            seen.append(h)


def images():
    return torch.randn(2, 4, 3, 5)


def fused(module):
    fastdiff.patch(module)
    return module


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def ran(monkeypatch):
    """The activations of the ops that patched modules call from now on."""
    calls, op = [], deferred.group_norm_silu
    monkeypatch.setattr(deferred, "group_norm_silu", lambda *a: calls.append(a[-1]) or op(*a))
    return calls


def test_all_forms_of_a_pair_fuse(monkeypatch):
    module, x = unzero(Features()), images()
    cases = [{}, {"early": True}, {"scale": torch.tensor(3.0)}]
    expected = [module(x, **case) for case in cases]
    report = fastdiff.patch(module)
    assert report.replaced == dict.fromkeys(["norm", "norm2"], "group_norm + silu")
    calls = ran(monkeypatch)
    for case, y in zip(cases, expected, strict=True):
        close(module(x, **case), y)
    # scale stands between the second pair: its norm runs alone.
    assert calls == ["silu"] * 2 + ["silu"] * 3 + ["silu", "identity"]


def test_other_methods_see_each_half():
    module, x = unzero(Features()), images()
    original = copy.deepcopy(module)
    fastdiff.patch(module)
    close(module.normalized(x), original.normalized(x))
    close(module.norm(x), original.norm(x))
    assert torch.equal(module.act(x), F.silu(x))
    for name in ("kept", "closed_over"):
        close(getattr(module, name)(x), getattr(original, name)(x))
    seen, expected = [], []
    close(module.after_return(x, seen), original.after_return(x, expected))
    close(seen, expected)


NETWORKS = ["UNet2DModel", "UNet2DConditionModel", "AutoencoderKL", "guided-diffusion"]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_normalization_and_activation_alone(name):
    """And the network itself, with gradients, while a feature extractor reads in between."""
    model, run, x = make(name)
    parts = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.SiLU))]
    probes = [torch.randn(2, getattr(m, "num_channels", 3), 4, 4) for m in parts]
    before = [m(p) for m, p in zip(parts, probes, strict=True)]
    names = [type(m).__name__ for m in model.modules()]
    expected = run(model, x)
    fastdiff.patch(model)
    for m, probe, y in zip(parts, probes, before, strict=True):
        close(m(probe), y)
    assert [type(m).__name__ for m in model.modules()] == names
    close(run(model, x), expected)
    fastdiff.unpatch(model)
    assert torch.equal(run(model, x), expected)


def test_a_decorated_forward_is_rewritten_below_its_decorators(monkeypatch):
    model, run, x = make("UNet2DConditionModel")
    assert hasattr(type(model).forward, "__wrapped__")
    expected = run(model, x)
    fastdiff.patch(model)
    calls = ran(monkeypatch)
    close(run(model, x), expected)
    assert calls[-1] == "silu"
    assert type(model).forward.__name__ == "forward"


def replace_on_instance(m):
    m.forward = lambda x: m.conv(2 * m.norm(x))


def replace_as_method(m):
    m.forward = types.MethodType(lambda self, x: self.conv(2 * self.norm(x)), m)


def replace_as_accelerate_does(m):
    """Its hooks keep the bound method."""
    m._old_forward = m.forward
    m.forward = lambda x: 3 * m._old_forward(x)


REPLACEMENTS = [replace_on_instance, replace_as_method, replace_as_accelerate_does]


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_a_forward_replaced_after_patching(replace):
    module, x = unzero(Features()), images()
    other = copy.deepcopy(module)
    replace(other)
    expected = other(x)
    fastdiff.patch(module)
    replace(module)
    close(module(x), expected)
    fastdiff.unpatch(module)
    assert torch.equal(module(x), expected)


def blocks():
    torch.manual_seed(0)
    resnet = ResnetBlock2D(in_channels=4, out_channels=4, temb_channels=8, groups=2)
    return [
        (unzero(Features()), (images(),)),
        (unzero(resnet).eval(), (images(), torch.randn(2, 8))),
        (unzero(ResBlock(4, 8, 4, 2, True, silu=nn.SiLU)).eval(), (images(), torch.randn(2, 8))),
        (nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), (images(),)),
        (nn.GroupNorm(2, 4), (images(),)),
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_class_whose_forward_is_replaced_after_patching(number, monkeypatch):
    """As ToMe, FreeU and the like do."""
    module, arguments = blocks()[number]
    cls = type(module)
    fastdiff.patch(module)
    for name in ("forward", "_forward"):
        if hasattr(cls, name):
            monkeypatch.setattr(cls, name, lambda self, *args: args[0] + 7)
    assert torch.equal(module(*arguments), arguments[0] + 7)
    monkeypatch.undo()
    assert not torch.equal(module(*arguments), arguments[0] + 7)


@pytest.mark.parametrize("cls", [nn.GroupNorm, nn.SiLU])
def test_a_class_of_a_part_replaced_after_patching(cls, monkeypatch):
    for module, arguments in blocks()[:4]:
        fastdiff.patch(module)
        calls = []
        with monkeypatch.context() as m:
            original = cls.forward
            m.setattr(cls, "forward", lambda self, x: calls.append(1) or original(self, x))  # noqa: B023
            module(*arguments)
        assert calls


class Counting(ResnetBlock2D):
    calls = 0

    def forward(self, input_tensor, temb):
        self.calls += 1
        return super().forward(input_tensor, temb)


class CountingResBlock(ResBlock):
    calls = 0

    def _forward(self, x, emb):
        self.calls += 1
        return super()._forward(x, emb)


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))


class Silently(nn.SiLU):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Swish(nn.Module):
    """SiLU by name and for one of its settings."""

    def __init__(self, beta):
        super().__init__()
        self.beta = beta

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


def test_owners_and_parts_of_subclasses():
    resnet = {"in_channels": 4, "out_channels": 4, "temb_channels": 8, "groups": 2}
    time = torch.randn(2, 8)
    cases = [
        (Counting(**resnet), (images(), time)),
        (CountingResBlock(4, 8, 4, 2, False), (images(), time)),
        (Backwards(nn.SiLU(), nn.GroupNorm(2, 4)), (images(),)),
        (nn.Sequential(nn.GroupNorm(2, 4), Silently()), (images(),)),
        (nn.Sequential(nn.GroupNorm(2, 4), Swish(1.0)), (images(),)),
        (nn.Sequential(nn.GroupNorm(2, 4), Swish(3.0)), (images(),)),
    ]
    for module, arguments in cases:
        unzero(module).eval()
        expected = module(*arguments)
        fastdiff.patch(module)
        close(module(*arguments), expected)
        if hasattr(module, "calls"):
            assert module.calls == 2
    assert cases[3][0][1].calls == 2


class Registered(nn.Module):
    """A base class that keeps a list of its subclasses by name."""

    known: dict = {}  # noqa: RUF012

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        Registered.known[cls.__name__] = cls


class Owner(Registered):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(x))


def test_names_and_registries():
    owner, cls = Owner(), Owner
    shown = repr(owner)
    assert fastdiff.patch(owner).replaced == {"norm": "group_norm + silu"}
    assert Registered.known["Owner"] is cls
    assert type(owner) is not cls
    assert isinstance(owner, cls)
    for module, original in ((owner, cls), (owner.norm, nn.GroupNorm)):
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(module), attribute) == getattr(original, attribute)
    assert repr(owner) == shown
    assert type(owner.act) is nn.SiLU
    fresh = type(owner)()  # a class is also called, by those who make a module like another
    close(fresh(x := images()), Owner()(x))


def test_diffusers_finds_its_classes_by_name(tmp_path):
    """Saved configurations, device maps (`_no_split_modules`), repeated blocks."""
    model, _, _ = make("UNet2DConditionModel")
    unsplit = model._get_no_split_modules("auto")
    wanted = [n for n, m in model.named_modules() if type(m).__name__ in unsplit]
    fastdiff.patch(model)
    assert model._get_no_split_modules("auto") == unsplit
    assert [n for n, m in model.named_modules() if type(m).__name__ in unsplit] == wanted != []
    model.save_pretrained(tmp_path)
    again = diffusers.AutoModel.from_pretrained(str(tmp_path))
    assert type(again) is diffusers.UNet2DConditionModel


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_and_exceptions_in_the_middle(use_reentrant):
    module, x = unzero(Features()), images().requires_grad_()
    module(x).square().sum().backward()
    expected, x.grad = x.grad, None
    fastdiff.patch(module)
    handle = module.conv.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module(x)
    close(module.norm(x), F.group_norm(x, 2, module.norm.weight, module.norm.bias))
    handle.remove()
    checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
    close(x.grad, expected)


def test_threads_and_reentrance():
    """One thread is inside the owner's forward while another calls its parts."""
    module, x = unzero(Features()), images()
    expected, normalized = module(x), module.norm(x)
    fastdiff.patch(module)
    inside, done, results = threading.Event(), threading.Event(), {}

    def wait(*_):
        inside.set()
        assert done.wait(30)

    handle = module.conv.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: results.update(y=module(x)))
    thread.start()
    assert inside.wait(30)
    close(module.norm(x), normalized)
    assert torch.equal(module.act(x), F.silu(x))
    done.set()
    thread.join()
    close(results["y"], expected)
    handle.remove()
    handle = module.conv.register_forward_hook(lambda *_: close(module.norm(x), normalized))
    close(module(x), expected)


def test_replicas_copies_and_pickles_are_fused(monkeypatch):
    module, x = unzero(Features()), images()
    expected = module(x)
    fastdiff.patch(module)
    replica = module._replicate_for_data_parallel()
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module) is type(replica)
        calls = ran(monkeypatch)
        close(other(x), expected)
        assert calls == ["silu", "silu"]
        monkeypatch.undo()
    fastdiff.unpatch(other)
    assert torch.equal(other(x), expected)
    assert type(other) is Features


def test_parts_replaced_and_compiled_after_patching(monkeypatch):
    for part in ("norm", "act"):
        module, x = unzero(Features()), images()
        fastdiff.patch(module)
        expected = module(x)
        called = []

        def look(graph_module, inputs, called=called):
            called.append(1)
            return graph_module.forward

        setattr(module, part, torch.compile(getattr(module, part), backend=look))
        close(module(x), expected)
        assert called
    module = fused(unzero(Features()))
    module.act = nn.GELU()
    other = unzero(Features())
    other.act = nn.GELU()
    close(module(x), other(x))
    module.norm = nn.Identity()
    other.norm = nn.Identity()
    close(module(x), other(x))


def test_what_a_rewritten_method_must_keep(monkeypatch):
    """super(), closures, defaults, mangled names, doc string, and the lines of a traceback."""
    constant = torch.tensor(2.0)

    class Base(Features):
        def forward(self, x, factor=3.0, *, shift=0.5):
            return super().forward(x) * factor + shift

    class Local(Base):
        """In a function, so that its methods have closures."""

        def forward(self, x, factor=5.0, *, shift: float = 1.5):
            """What it does."""
            h = self.act(self.norm2(x))
            return super().forward(h, factor, shift=shift) * constant

    class Mangled(Features):
        __factor = 7.0

        def forward(self, x):
            return self.act(self.norm(x)) * self.__factor

    for cls, calls_expected in ((Local, 1), (Mangled, 0)):
        module, x = unzero(cls()), images()
        expected = module(x)
        fastdiff.patch(module)
        calls = ran(monkeypatch)
        close(module(x), expected)
        # In Local.forward; what super().forward calls is another class's code, and not rewritten.
        assert calls.count("silu") == calls_expected
        monkeypatch.undo()
        assert module.forward.__doc__ == cls.forward.__doc__
    module = fused(Local())
    constant = torch.ones(7)  # a closure is a variable, not a value
    with pytest.raises(RuntimeError, match="must match") as caught:
        module(images())
    line = [e for e in caught.traceback if e.path.name == "test_patch_owners.py"][-1]
    assert "* constant" in str(line.statement)


def test_a_changed_file_is_left_alone(tmp_path, monkeypatch):
    """What would be rewritten must be what runs."""
    import importlib
    import linecache

    file = tmp_path / "some_network.py"
    source = (
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()\n\n"
        "    def forward(self, x):\n        return self.act(self.norm(x))\n"
    )
    file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    net, x = importlib.import_module("some_network").Net(), images()
    expected = net(x)
    file.write_text(source.replace("return ", "return 2 * "))
    linecache.checkcache(str(file))
    assert fastdiff.patch(net).replaced == {"norm": "group_norm"}
    close(net(x), expected)


def test_ensembles():
    """torch.func's stack_module_state and functional_call under vmap."""
    models = [unzero(Features(), seed) for seed in range(3)]
    x = images()
    expected = torch.stack([m(x) for m in models])
    for m in models:
        fastdiff.patch(m)
    state = torch.func.stack_module_state(models)

    def run(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    close(torch.func.vmap(run, (0, 0, None))(*state, x), expected)
    wide = x.contiguous(memory_format=torch.channels_last)
    close(torch.func.vmap(run, (0, 0, None))(*state, wide), expected)
