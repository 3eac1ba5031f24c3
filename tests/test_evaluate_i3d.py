"""I3D: names, numbers and paddings of the published network, and files that are what they are said to be."""

from __future__ import annotations

import hashlib
import io
import warnings
from email.message import Message

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from animatelcm.evaluate.i3d import I3D, Mixed, load_i3d, pooled, same
from animatelcm.weights.files import write_safetensors

ADDRESS = "https://weights.example/i3d.pt"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = I3D(epsilon=1e-5).eval().requires_grad_(False)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_var.uniform_(1e-4, 2e-4)
    return network


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d_pretrained_400.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def small():
    """A clip that costs little."""
    return torch.rand(1, 3, 9, 193, 193, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Program(nn.Module):
    """In place of i3d_torchscript.pt: logits only where it is called as that has to be."""

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        if rescale or resize or not return_features:
            return x
        return x.mean(dim=(1, 2, 3, 4))[:, None].expand(-1, 400)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Program()).save(path)
    return path


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_names_are_the_ports():
    blocks = [f"Mixed_{name}" for name in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")]
    units = ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"]
    units += [f"{block}.{branch}" for block in blocks for branch in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")]
    parts = ["conv3d.weight"] + [f"bn.{x}" for x in ("weight", "bias", "running_mean", "running_var")]
    names = {f"{unit}.{part}" for unit in units for part in [*parts, "bn.num_batches_tracked"]}
    assert I3D().state_dict().keys() == names | {"logits.conv3d.weight", "logits.conv3d.bias"}


def test_numbers_are_as_many_as_published():
    """12.3 million up to the last pooling, norms' scales and shifts included, and 1024 + 1 for every class."""
    assert sum(p.numel() for p in I3D().parameters()) == 12_697_264 == 12_287_264 + 400 * 1025
    assert sum(p.numel() for p in I3D(classes=600).parameters()) == 12_287_264 + 600 * 1025


@pytest.mark.parametrize("side", [5, 6, 7, 8, 14])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (2, 2), (3, 2), (7, 2)])
def test_padding_is_tensorflows(side, kernel, stride):
    """out[i] = sum_k w[k] x[i * stride + k - before]: ceil(side / stride) cells, an odd zero at the end."""
    source = np.random.default_rng(side)
    x, w = source.normal(size=side), source.normal(size=kernel)
    cells = -(-side // stride)
    before = max((cells - 1) * stride + kernel - side, 0) // 2
    reach = [(i, k, i * stride + k - before) for i in range(cells) for k in range(kernel)]
    out = np.zeros(cells)
    for i, k, at in reach:
        out[i] += w[k] * x[at] if 0 <= at < side else 0
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = -1
        sizes, strides = [1, 1, 1], [1, 1, 1]
        sizes[axis], strides[axis] = kernel, stride
        padded = same(torch.from_numpy(x).reshape(shape), tuple(sizes), tuple(strides))
        found = F.conv3d(padded, torch.from_numpy(w).reshape(shape), stride=tuple(strides))
        np.testing.assert_allclose(found.flatten().numpy(), out, atol=1e-12)


def test_zeros_beyond_the_border_change_no_pooling_behind_a_relu():
    x = torch.rand(2, 3, 5, 7, 8)
    around = F.pad(x, (1, 1, 1, 1, 1, 1), value=-torch.inf)
    assert torch.equal(pooled(x, (3, 3, 3), (1, 1, 1)), F.max_pool3d(around, 3, 1))


def test_sixteen_frames_become_one_place_of_two_by_seven_by_seven(network):
    sizes = {}
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: sizes.update({name: tuple(out.shape[1:])}))
        for name, part in network.named_children()
        if name.startswith(("Conv3d", "Mixed"))
    ]
    assert network(torch.zeros(1, 3, 16, 224, 224)).shape == (1, 400)
    for hook in hooks:
        hook.remove()
    assert sizes["Conv3d_1a_7x7"] == (64, 8, 112, 112)
    assert sizes["Conv3d_2c_3x3"] == (192, 8, 56, 56)
    assert sizes["Mixed_3c"] == (480, 8, 28, 28)
    assert sizes["Mixed_4f"] == (832, 4, 14, 14)
    assert sizes["Mixed_5c"] == (1024, 2, 7, 7)


def test_branches_stand_in_order():
    """Where all channels see one alone, blocks of the result are scaled as the branches are."""

    def unit(inputs, outputs, kernel, stride=1):
        layer = nn.Conv3d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.zeros_(layer.weight)
        layer.weight.data[..., kernel // 2, kernel // 2, kernel // 2] = 1 / inputs
        return layer

    mixed = Mixed(2, (1, (2, 3), (4, 5), 6), unit)
    for number, name in enumerate(("b0", "b1b", "b2b", "b3b"), start=1):
        getattr(mixed, name).weight.data *= number
    seen = mixed(torch.ones(1, 2, 3, 4, 4))[0, :, 1, 1, 1]
    torch.testing.assert_close(seen, torch.tensor([1.0] + 3 * [2.0] + 5 * [3.0] + 6 * [4.0]))


@pytest.mark.parametrize("kind", [".pt", "old .pt", ".safetensors"])
def test_a_file_is_the_network_that_it_was_written_of(network, file, small, tmp_path, kind):
    path, state = file, network.state_dict()
    if kind == "old .pt":
        path = tmp_path / "old.pt"
        torch.save({key: value for key, value in state.items() if "num_batches" not in key}, path)
    if kind == ".safetensors":
        path = tmp_path / "i3d.safetensors"
        write_safetensors(state, path)
    detector = load_i3d(path, epsilon=1e-5)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert detector.facts == {"network": "I3D", "weights": digest, "epsilon": 1e-5}
    assert torch.equal(detector.logits(small), network(small))


def test_epsilon_matters_and_is_told(network, file, small):
    other = load_i3d(file)
    assert other.facts["epsilon"] == 1e-3
    assert not torch.allclose(other.logits(small), network(small), rtol=0.01)


def test_a_program_gets_pixels_as_they_are(program):
    detector = load_i3d(program, sha256=digest_of(program))
    x = torch.rand(2, 3, 4, 5, 5)
    torch.testing.assert_close(detector.logits(x), x.mean(dim=(1, 2, 3, 4))[:, None].expand(2, 400))
    assert detector.facts == {
        "network": "I3D, TorchScript",
        "weights": digest_of(program),
    }


def test_a_program_is_run_by_its_hash_alone(program, monkeypatch):
    """Tensors by name need none: nothing in them runs."""
    monkeypatch.setattr(torch.jit, "load", None)
    with pytest.raises(ValueError, match=rf"is a program, which could do anything.*sha256sum {program} prints it"):
        load_i3d(program)


def test_another_program_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Identity()).save(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is no I3D"):
        load_i3d(tmp_path / "other.pt", sha256=digest_of(tmp_path / "other.pt"))


@pytest.mark.parametrize("which", ["file", "program"])
def test_another_hash_is_refused_before_anything_is_loaded(which, request, monkeypatch):
    path = request.getfixturevalue(which)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_i3d(path, sha256=digest.upper()).facts["weights"] == digest
    monkeypatch.setattr(torch.jit, "load", None)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=f"{path.name} has the SHA-256 {digest}, and {'0' * 64} is asked for"):
        load_i3d(path, sha256="0" * 64)


def test_an_address_is_fetched_once_and_checked(program, tmp_path, monkeypatch):
    body, asked = program.read_bytes(), []

    class Answer(io.BytesIO):
        def info(self):
            return Message()

    def urlopen(request, *_, **__):
        asked.append(request.full_url)
        return Answer(body)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", None)
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    digest = hashlib.sha256(body).hexdigest()
    with pytest.raises(ValueError, match="needs the SHA-256"):
        load_i3d(ADDRESS)
    with pytest.raises(ValueError, match="gives no file of that SHA-256"):
        load_i3d(ADDRESS, sha256="0" * 64)
    assert not list(tmp_path.rglob("*.pt"))
    for _ in range(2):
        assert load_i3d(ADDRESS, sha256=digest).facts["weights"] == digest
    assert asked == [ADDRESS] * 2  # the refused one, and one that was kept


def test_what_is_no_i3d_of_kinetics_400_is_named(network, tmp_path):
    state, path = network.state_dict(), tmp_path / "wrong.pt"
    charades = {**state, "logits.conv3d.weight": torch.zeros(157, 1024, 1, 1, 1)}
    for wrong, said in (
        (charades, r"logits\.conv3d\.weight is \(157"),
        ({key: value for key, value in state.items() if "Mixed_4c.b0" not in key}, r"Mixed_4c\.b0\..* is missing"),
        ({**state, "logits.conv3d.bias": torch.full((400,), torch.nan)}, r"logits\.conv3d\.bias holds numbers"),
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=rf"wrong\.pt: {said}"):
            load_i3d(path)
    for text, said in (
        ("<!DOCTYPE html><html>404</html>", r"wrong\.pt is a web page, as failed downloads leave them"),
        ("\n <html>Sign in</html>", r"wrong\.pt is a web page"),
        ("not found", r"wrong\.pt is damaged or no file of torch\.save"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            load_i3d(path)
    with pytest.raises(ValueError, match=r"none\.pt is missing"):
        load_i3d(tmp_path / "none.pt")


@pytest.mark.parametrize("which", ["file", "program"])
@pytest.mark.parametrize("share", [0.3, 0.999])
def test_a_file_that_was_cut_short_is_named(which, share, request, tmp_path):
    data = request.getfixturevalue(which).read_bytes()
    path = tmp_path / "i3d.pt"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"i3d\.pt (is|has) .*fetch it again"):
        load_i3d(path, sha256=digest_of(path))
