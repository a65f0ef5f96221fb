"""The tests of `tf.contrib.layers.rev_block` and tensor2tensor's encoder-decoder case, as they are meant."""

# pyright: reportUnknownLambdaType=false
from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import WAYS, Pair, assert_steps, block, leaf, lines, outcome, relative_error
from torch import Tensor, nn

from revfx import RevBlock, rev_block


CHANNELS, NUM_LAYERS, BATCH = 8, 4, 16


def linear() -> nn.Linear:
    return nn.Linear(CHANNELS // 2, CHANNELS // 2)


def relu_linear() -> nn.Sequential:
    return nn.Sequential(linear(), nn.ReLU())


class LinearPlusSide(nn.Linear):
    def __init__(self) -> None:
        super().__init__(CHANNELS // 2, CHANNELS // 2)

    def forward(self, input: Tensor, side: list[Tensor] | None = None) -> Tensor:
        return super().forward(input) + (0 if side is None else side[0])


class ConvBatchNorm(nn.Module):
    """conv1d -> BN -> conv1d -> BN over channels that come last."""

    def __init__(self) -> None:
        super().__init__()
        width = CHANNELS // 2
        conv = [nn.Conv1d(width, width, 3, padding="same") for _ in range(2)]
        self.layers = nn.Sequential(conv[0], nn.BatchNorm1d(width), conv[1], nn.BatchNorm1d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape).requires_grad_()


def assert_trains_like_plain(
    fs: list[nn.Module], gs: list[nn.Module], x: Tensor, f_side: list[Tensor] | None = None
) -> None:
    modules = nn.ModuleList([*fs, *gs])
    module = RevBlock(fs, gs, len(fs))

    def run(way: str, x: Tensor, *side: Tensor) -> Tensor:
        halves: Any = torch.chunk(x, 2, dim=-1)
        given = list(side) or None
        if way == "by hand":
            y = lines(fs, gs)(*halves, given)
        elif way == "RevBlock":
            y = module(*halves, given)
        else:
            y = rev_block(halves[0], halves[1], fs, gs, len(fs), given, is_training=way == "training")
        return torch.cat(y, dim=-1).add(10).mean()

    inputs = [x, *(f_side or ())]
    expected = outcome(lambda *a: run("by hand", *a), inputs, modules)
    for way in ("training", "not training", "RevBlock"):
        assert_steps(lambda *a, way=way: run(way, *a), expected, inputs, modules)
    assert all(g is not None for g in (*expected.input_grads, *expected.parameter_grads))


def test_forward_then_inverse_gives_the_input_back() -> None:
    x1, x2 = torch.chunk(uniform(BATCH, CHANNELS), 2, dim=-1)
    module = RevBlock(linear, linear, num_layers=3)
    back = module.inverse(*module(x1, x2))
    torch.testing.assert_close(back, (x1, x2), rtol=0, atol=1e-5)


def test_inverse_then_forward_gives_the_output_back() -> None:
    y1, y2 = torch.chunk(uniform(BATCH, CHANNELS), 2, dim=-1)
    module = RevBlock(linear, linear, num_layers=3)
    back = module(*module.inverse(y1, y2))
    torch.testing.assert_close(back, (y1, y2), rtol=1e-5, atol=1e-6)


def test_same_as_plain_with_defaults() -> None:
    assert_trains_like_plain(
        [linear() for _ in range(NUM_LAYERS)], [linear() for _ in range(NUM_LAYERS)], uniform(BATCH, CHANNELS)
    )


def test_same_as_plain_with_one_layer() -> None:
    assert_trains_like_plain([linear()], [linear()], uniform(BATCH, CHANNELS))


def test_same_as_plain_with_a_side_input_of_f_only() -> None:
    fs: list[nn.Module] = [LinearPlusSide() for _ in range(NUM_LAYERS)]
    gs: list[nn.Module] = [linear() for _ in range(NUM_LAYERS)]
    assert_trains_like_plain(fs, gs, uniform(BATCH, CHANNELS), [uniform(BATCH, CHANNELS // 2)])


def test_same_as_plain_with_other_functions_in_each_layer() -> None:
    f1, f2 = linear(), relu_linear()
    assert_trains_like_plain([f1, f2, f1, f2], [f2, f1, f2, f1], uniform(BATCH, CHANNELS))
    assert_trains_like_plain(
        [linear(), relu_linear(), linear(), relu_linear()],
        [linear() for _ in range(4)],
        uniform(BATCH, CHANNELS),
    )


@pytest.mark.parametrize("training", [True, False])
def test_same_as_plain_with_convolutions_and_batch_norm(training: bool) -> None:
    fs: list[nn.Module] = [ConvBatchNorm().train(training) for _ in range(NUM_LAYERS)]
    gs: list[nn.Module] = [ConvBatchNorm().train(training) for _ in range(NUM_LAYERS)]
    modules = nn.ModuleList([*fs, *gs]).double()
    x = torch.rand(BATCH, 10, CHANNELS, dtype=torch.float64).requires_grad_()

    def halves(x: Tensor) -> Any:
        return torch.chunk(x, 2, dim=-1)

    expected = outcome(lambda x: lines(fs, gs)(*halves(x)), [x], modules)
    for way in WAYS:
        run = block(way, fs, gs)
        assert_steps(lambda x, run=run: run(*halves(x)), expected, [x], modules)


def test_calling_it_again_makes_no_new_parameters() -> None:
    module = RevBlock(linear, linear, num_layers=NUM_LAYERS)
    names = list(module.state_dict())
    assert len(names) == NUM_LAYERS * 2 * 2
    x1, x2 = torch.chunk(uniform(BATCH, CHANNELS), 2, dim=-1)
    outputs = [module(x1, x2) for _ in range(3)]
    assert list(module.state_dict()) == names
    assert all(torch.equal(a, b) for y in outputs[1:] for a, b in zip(y, outputs[0], strict=True))


# --- tensor2tensor: a decoder whose layers attend to themselves and to an encoder's output
HIDDEN, HEADS, VOCABULARY = 128, 4, 9
SOURCE, TARGET, SENTENCES = 5, 7, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None, bias: Tensor) -> Tensor:
        x = self.norm(x)
        memory = x if memory is None else memory
        q, k, v = (
            layer(t).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, t in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5 + bias, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(-2))


class DecoderAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention, self.encoder_attention = Attention(), Attention()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, side: list[Tensor]) -> Tensor:
        self_bias, encoder_bias, encoder_output = side
        x = self.drop(self.self_attention(x, None, self_bias))
        return self.drop(self.encoder_attention(x, encoder_output, encoder_bias))


class EncoderAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, side: list[Tensor]) -> Tensor:
        return self.attention(x, None, side[0])


def feed_forward() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, HIDDEN)
    )


class EncoderDecoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.encoder = RevBlock(EncoderAttention, feed_forward, layers)
        self.decoder = RevBlock(DecoderAttention, feed_forward, layers)

    def run(self, part: RevBlock, reversible: bool, x: Tensor, side: list[Tensor]) -> Tensor:
        pair: Pair = part(x, x, side) if reversible else lines(part.f, part.g)(x, x, side)
        return (pair[0] + pair[1]) / 2

    def forward(self, source: Tensor, target: Tensor, reversible: bool = True) -> Tensor:
        padding = torch.where(source == 0, -1e9, 0.0)[:, None, None, :]
        causal = torch.full((TARGET, TARGET), -1e9).triu(1)
        encoded = self.run(self.encoder, reversible, self.embedding(source), [padding])
        decoded = self.run(self.decoder, reversible, self.embedding(target), [causal, padding, encoded])
        return decoded @ self.embedding.weight.T


def test_a_step_of_an_encoder_decoder_whose_side_inputs_are_biases_and_the_encoders_output() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder().double()
    source = torch.randint(0, VOCABULARY, (SENTENCES, SOURCE))
    target = torch.randint(0, VOCABULARY, (SENTENCES, TARGET))

    def step(reversible: bool) -> Tensor:
        logits = model(source, target, reversible)
        assert logits.shape == (SENTENCES, TARGET, VOCABULARY)
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    expected = outcome(lambda: step(False), module=model)
    assert all(g is not None and g.abs().sum() > 0 for g in expected.parameter_grads)
    assert_steps(lambda: step(True), expected, module=model)


def test_side_inputs_gradient_sums_over_the_layers() -> None:
    fs, gs = [LinearPlusSide() for _ in range(3)], [nn.Identity() for _ in range(3)]
    for m in (*fs, *gs):
        m.requires_grad_(False).double()
    side = leaf(BATCH, CHANNELS // 2)
    x1, x2 = (torch.rand(BATCH, CHANNELS // 2, dtype=torch.float64) for _ in range(2))
    got = torch.autograd.grad(rev_block(x1, x2, fs, gs, 3, [side])[0].sum(), side)
    expected = torch.autograd.grad(lines(fs, gs)(x1, x2, [side])[0].sum(), side)
    assert relative_error(got, expected) < 1e-9
