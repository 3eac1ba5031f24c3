from __future__ import annotations

import pytest
import torch

from animatelcm.ema import Ema, absorbed


def walk(steps: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        {"a": torch.randn(4, 3, generator=rng).to(dtype), "b.c": torch.randn(5, generator=rng).to(dtype)}
        for _ in range(steps)
    ]


def follow(ema: Ema, points: list[dict[str, torch.Tensor]]) -> Ema:
    for point in points:
        ema.update(point)
    return ema


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.9999, 1.0])
def test_average_is_the_weighted_sum_of_all_it_saw(decay: float) -> None:
    points = walk(30)
    ema = follow(Ema(decay, points[0]), points[1:])
    for name, shadow in ema.state_dict().items():
        # 30 points: the start has decay^29, point i has (1 - decay) * decay^(29 - i)
        expected = decay**29 * points[0][name].double() + sum(
            (1 - decay) * decay ** (29 - i) * points[i][name].double() for i in range(1, 30)
        )
        torch.testing.assert_close(shadow.double(), expected, rtol=0, atol=1e-6)


def test_online_tensors_are_neither_shared_nor_changed() -> None:
    first, second = walk(2)
    kept = {name: value.clone() for name, value in first.items()}
    follow(Ema(0.5, first), [second])
    assert all(torch.equal(first[name], kept[name]) for name in first)


def test_follows_by_name_not_by_order() -> None:
    points = walk(5)
    backwards = [dict(reversed(point.items())) for point in points]
    one, other = follow(Ema(0.9, points[0]), points), follow(Ema(0.9, backwards[0]), points)
    assert all(torch.equal(one.shadows[name], other.shadows[name]) for name in one.shadows)


def test_a_saved_average_continues_exactly(tmp_path) -> None:
    points = walk(40)
    whole = follow(Ema(0.97, points[0]), points)
    torch.save(follow(Ema(0.97, points[0]), points[:20]).state_dict(), tmp_path / "ema.pt")
    resumed = Ema(0.97, walk(1, seed=9)[0])
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    follow(resumed, points[20:])
    assert all(torch.equal(whole.shadows[name], resumed.shadows[name]) for name in whole.shadows)


def test_half_precision_weights_do_not_stall_the_average() -> None:
    """In bfloat16 a step of 0.01 % of the way rounds to nothing; the shadows are float32."""
    start, goal = {"w": torch.ones(3, dtype=torch.bfloat16)}, {"w": torch.full((3,), 2.0).bfloat16()}
    ema = Ema(0.9999, start)
    follow(ema, [goal] * 100)
    torch.testing.assert_close(ema.shadows["w"], torch.full((3,), 1 + absorbed(100, 0.9999)), rtol=1e-5, atol=0)
    stalled = start["w"].clone()
    for _ in range(100):
        stalled.lerp_(goal["w"], 1e-4)
    assert torch.equal(stalled, start["w"])


def test_parameters_of_a_module_are_followed_without_gradient() -> None:
    net = torch.nn.Linear(3, 2)
    ema = Ema(0.5, net.named_parameters())
    ema.update(net.named_parameters())
    assert not any(shadow.requires_grad for shadow in ema.shadows.values())
    assert ema.shadows.keys() == dict(net.named_parameters()).keys()


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.95, 0.999])
def test_absorbed_is_what_a_merged_weight_average_holds(decay: float) -> None:
    """AnimateLCM's initialisation strategy: an EMA of merged weights W0 + B A that starts from W0 alone.

    Run for real in float64, against one scalar times the frozen LoRA.
    """
    rng = torch.Generator().manual_seed(1)
    w_0 = torch.randn(12, 8, generator=rng, dtype=torch.float64)
    lora = torch.randn(12, 3, generator=rng).double() @ torch.randn(3, 8, generator=rng).double()
    target = w_0.clone()
    for step in range(201):
        torch.testing.assert_close(target, w_0 + absorbed(step, decay) * lora, rtol=0, atol=1e-12)
        target = decay * target + (1 - decay) * (w_0 + lora)


def test_absorbed_agrees_with_ema() -> None:
    ema = Ema(0.95, {"delta": torch.zeros(3)})
    for step in range(1, 120):
        ema.update({"delta": torch.ones(3)})
        torch.testing.assert_close(ema.shadows["delta"], torch.full((3,), absorbed(step, 0.95)))


@pytest.mark.parametrize("odd", [{}, {"a": torch.zeros(4, 3)}, {**walk(1)[0], "new": torch.zeros(1)}])
def test_other_names_are_refused(odd: dict) -> None:
    ema = Ema(0.9, walk(1)[0])
    with pytest.raises(ValueError, match="names differ"):
        ema.update(odd)
    with pytest.raises(ValueError, match="names differ"):
        ema.load_state_dict(odd)


def test_other_shapes_and_impossible_decays_are_refused() -> None:
    ema = Ema(0.9, walk(1)[0])
    # One row would broadcast silently.
    with pytest.raises(ValueError, match=r"a is \(1, 3\)"):
        ema.load_state_dict({**walk(1)[0], "a": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match=r"decay=1\.5"):
        Ema(1.5, {})
