"""Training of continuous tokens: the autoencoder's and the MAR's losses, and runs on a few tiny images."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.helpers.tiny import image_folder
from visar.cli import main
from visar.errors import VisarError
from visar.families.mar.autoencoder import KLAutoencoder, fingerprint, to_latents, to_tokens
from visar.families.mar.diffusion import TRAINING_STEPS, alphas_bar
from visar.families.mar.transformer import MAR
from visar.pipelines import TextToImagePipeline
from visar.text_encoders.words import WordEncoder
from visar.training.autoencoder import AutoencoderLoss, train_autoencoder
from visar.training.data import ImageSet
from visar.training.loop import TrainConfig, make_optimizers
from visar.training.mar import LatentSamples, MARLoss, initialise, masked_share, mean_loss, train_mar

SIZES: dict[str, Any] = dict(channels=(8, 8), blocks=1, latent_channels=4, groups=4, attention=False)
SMALL: dict[str, Any] = dict(token_dim=4, grid=4, dim=32, encoder_layers=1, decoder_layers=1, num_heads=1,
                             head_width=32, head_layers=1, condition="text", buffer=4, caption_features=6)  # fmt: skip


def config(out: Path, steps: int) -> TrainConfig:
    return TrainConfig(out=out, minutes=1e9, steps=steps, batch=8, lr=3e-3, warmup=2, ema=0.9, compile=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet(image_folder(tmp_path_factory.mktemp("images") / "set", 40))


def test_tokens_are_latents_in_raster_order() -> None:
    latents = torch.arange(24.0).view(1, 2, 3, 4)
    tokens = to_tokens(latents)
    assert tokens.shape == (1, 12, 2) and tokens[0, 5].tolist() == [latents[0, 0, 1, 1], latents[0, 1, 1, 1]]
    assert torch.equal(to_latents(tokens, 3), latents)


def test_the_autoencoder_loss_is_its_parts() -> None:
    torch.manual_seed(0)
    loss = AutoencoderLoss(KLAutoencoder(**SIZES), divergence=0.5)
    pixels, noise = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8), torch.randn(3, 4, 4, 4)
    x = pixels.float() / 127.5 - 1
    mean, log_variance = loss.vae.encode(x)
    law = Normal(mean, (log_variance / 2).exp())
    y = loss.vae.decode(law.mean + law.stddev * noise)
    nats = kl_divergence(law, Normal(0.0, 1.0)).sum((1, 2, 3))
    wanted = (y - x).abs().mean() + 2 * (y - x).square().mean() + 0.5 * nats.mean() / (3 * 8 * 8)
    assert loss(pixels, noise).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_trained_autoencoder_draws_better_and_knows_its_scale(data: ImageSet, tmp_path: Path) -> None:
    vae = train_autoencoder(data, 8, config(tmp_path, 60), SIZES)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["psnr_held_out"] > 8 and log[-1]["nats_per_image"] > 0
    from visar.training.autoencoder import encode

    mean, std = encode(vae, data.pixels(8)[data.indices("train")])
    tokens = (mean + std * torch.randn(mean.shape)) * vae.config.scaling_factor
    assert tokens.var().item() == pytest.approx(1, abs=0.1)
    again = KLAutoencoder.from_pretrained(tmp_path / "vae")
    assert again.config.scaling_factor == vae.config.scaling_factor and fingerprint(again) == fingerprint(vae)
    with pytest.raises(VisarError, match="multiple of 2 pixels, not 9"):
        train_autoencoder(data, 9, config(tmp_path / "b", 1), SIZES)
    (tmp_path / "state.pt").unlink()  # so that it might be anybody's
    with pytest.raises(VisarError, match=r"vae is not of a run that can resume, which has a state\.pt; give another"):
        train_autoencoder(data, 8, config(tmp_path, 60), SIZES)


def head_only(seed: int = 0) -> MARLoss:
    torch.manual_seed(seed)
    return MARLoss(initialise(MAR(**SMALL)))


def test_the_head_loss_of_no_prediction_is_that_of_the_formula() -> None:
    """A head that says 0: an error of 1, and a bound of half the squared step of the mean over the variance."""
    loss = head_only()
    rows = 4000
    g = torch.Generator().manual_seed(0)
    time = torch.randint(1, TRAINING_STEPS - 1, (rows,), generator=g)
    noise = torch.randn(rows, 4, generator=g)
    found = loss.head_loss(torch.randn(rows, 4, generator=g), torch.randn(rows, 32, generator=g), time, noise)
    bar = alphas_bar().flip(0)
    before = alphas_bar().flip(0)[time + 1]
    bar = bar[time]
    beta = 1 - bar / before
    posterior = beta * (1 - before) / (1 - bar)
    # mu = (x - beta / sqrt(1 - bar) * eps) / sqrt(alpha), so an error of eps moves it by beta / sqrt(alpha (1 - bar)).
    moved = (beta / (1 - beta).sqrt() / (1 - bar).sqrt())[:, None] * noise
    # `place` 0 is half way between the logarithms.
    log_variance = 0.5 * (beta.log() + posterior.log())[:, None]
    bound = 0.5 * (log_variance - posterior.log()[:, None] + (posterior[:, None] + moved**2) / log_variance.exp() - 1)
    assert found.item() == pytest.approx((noise.square().mean() + bound.mean()).item(), rel=1e-3)


def test_the_bound_does_not_train_the_mean() -> None:
    loss = head_only()
    for p in loss.mar.diffloss.parameters():
        torch.nn.init.normal_(p, std=0.1)
    g = torch.Generator().manual_seed(0)
    clean, z, noise = torch.randn(64, 4, generator=g), torch.randn(64, 32, generator=g), torch.randn(64, 4, generator=g)
    time = torch.randint(TRAINING_STEPS, (64,), generator=g)
    last = loss.mar.diffloss.net.final_layer.linear
    loss.head_loss(clean, z, time, noise).backward()
    both = last.weight.grad.clone()
    root, share, _, _ = loss.tables[:, time].unsqueeze(-1)
    loss.zero_grad()
    predicted, _ = loss.mar.diffloss.net(root * clean + share * noise, loss.schedule.times[time], z)
    torch.nn.functional.mse_loss(predicted, noise).backward()
    assert torch.allclose(both[:4], last.weight.grad[:4], atol=1e-6) and (both[4:] != 0).any()


def test_only_hidden_tokens_are_asked_for() -> None:
    loss = head_only()
    tokens, order = torch.randn(2, 16, 4), torch.stack([torch.randperm(16) for _ in range(2)])
    asked: list[torch.Tensor] = []
    loss.head_loss = lambda clean, *_: asked.append(clean) or clean.sum()  # type: ignore[method-assign, func-returns-value]
    rest = torch.randn(2, 4, 6), torch.zeros(2, dtype=torch.bool)
    loss(tokens, order[:, :6], order[:, 6:], *rest, torch.zeros(2, 10, dtype=torch.long), torch.randn(2, 10, 4))
    wanted = torch.cat([tokens[i, order[i, 6:]] for i in range(2)])
    assert torch.equal(asked[0], wanted)


def test_dropped_rows_have_the_null_slots() -> None:
    loss = head_only()
    for p in loss.mar.parameters():
        torch.nn.init.normal_(p, std=0.1)
    g = torch.Generator().manual_seed(0)
    tokens, order = torch.randn(2, 16, 4, generator=g), torch.arange(16).expand(2, -1)
    rest = torch.zeros(2, 10, dtype=torch.long), torch.randn(2, 10, 4, generator=g)

    def of(features: torch.Tensor, drop: bool) -> float:
        return loss(tokens, order[:, :6], order[:, 6:], features, torch.tensor([drop] * 2), *rest).item()

    one, other = torch.randn(2, 4, 6, generator=g), torch.randn(2, 4, 6, generator=g)
    assert of(one, True) == of(other, True) != of(one, False) != of(other, False)


def test_training_attention_is_the_fused_one() -> None:
    mar = MAR(**SMALL | dict(num_heads=2))
    for p in mar.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, known, slots = torch.randn(2, 16, 4), torch.arange(5).expand(2, -1), torch.randn(2, 4, 32)
    assert torch.allclose(mar.train()(x, known, slots), mar.eval()(x, known, slots), atol=1e-5)


def test_shares_hidden_are_of_the_cut_normal_law() -> None:
    g = torch.Generator().manual_seed(0)
    shares = torch.tensor([masked_share(g, 0.7) for _ in range(4000)])
    assert 0.7 <= shares.min() < 0.705 and 0.995 < shares.max() <= 1
    # The half-normal law of 1 - share, of spread 0.25, cut at 0.3.
    z, density = 0.3 / 0.25, math.exp(-(0.3**2) / (2 * 0.25**2))
    mean = 0.25 * math.sqrt(2 / math.pi) * (1 - density) / math.erf(z / math.sqrt(2))
    assert 1 - shares.mean().item() == pytest.approx(mean, abs=0.006)


def test_muon_takes_the_blocks_matrices(tmp_path: Path) -> None:
    one = TrainConfig(out=tmp_path, optimizer="muon")
    adam, muon = make_optimizers(MAR(**SMALL), one)
    assert sum(p.numel() for g in muon.param_groups for p in g["params"]) > 20000
    assert not {id(p) for g in muon.param_groups for p in g["params"]} & {
        id(p) for g in adam.param_groups for p in g["params"]
    }


def test_a_run_learns_and_leaves_a_model_that_draws(data: ImageSet, words: WordEncoder, tmp_path: Path) -> None:
    vae = KLAutoencoder(**SIZES).eval()
    samples = LatentSamples(vae, words, data, 8)
    rows = data.indices("train")
    torch.manual_seed(0)
    before = mean_loss(head_only(), samples, rows)
    mar = train_mar(data, 8, config(tmp_path, 60), vae, words, 32, 1, 1, 32, 1)
    assert mean_loss(MARLoss(mar), samples, rows) < 0.9 * before
    log = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert log["train"] == pytest.approx(mean_loss(MARLoss(mar), samples, rows[:128]), abs=1e-3)
    (tmp_path / "state.pt").unlink()  # so that it might be anybody's
    with pytest.raises(VisarError, match=r"mar is not of a run that can resume, which has a state\.pt; give another"):
        train_mar(data, 8, config(tmp_path, 60), vae, words)
    again = MAR.from_pretrained(tmp_path / "mar")
    assert again.config.vae == fingerprint(vae)
    pipe = TextToImagePipeline(mar=again, vae=vae, text_encoder=words)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red 1").images[0].size == (8, 8)


@pytest.mark.filterwarnings("ignore:Words not known")
def test_variants_are_learnt_and_training_goes_on(data: ImageSet, words: WordEncoder, tmp_path: Path) -> None:
    vae, rows = KLAutoencoder(**SIZES).eval(), data.indices("train")[:4]
    samples = LatentSamples(vae, words, data, 8, varied=True)

    def drawn(seed: int, rng: random.Random | None) -> torch.Tensor:
        return samples(rows, torch.Generator().manual_seed(seed), rng)[0]

    plain = LatentSamples(vae, words, data, 8)(rows, torch.Generator().manual_seed(0))[0]
    assert torch.equal(drawn(0, None), plain) and torch.equal(drawn(0, random.Random(0)), drawn(0, random.Random(0)))
    assert (drawn(0, random.Random(0)) - plain).abs().amax((1, 2)).min() > 0.01
    sizes = (32, 1, 1, 32, 1)
    first = train_mar(data, 8, config(tmp_path / "a", 4), vae, words, *sizes, varied=True)
    still = TrainConfig(out=tmp_path / "b", minutes=1e9, steps=1, batch=8, lr=1e-9, warmup=2, compile=False)
    start = MAR.from_pretrained(tmp_path / "a" / "mar")
    second = train_mar(data, 8, still, vae, words, *sizes, varied=True, start=start)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(VisarError, match="is another one: dim 32 instead of 48"):
        train_mar(data, 8, still, vae, words, 48, *sizes[1:], start=start)
    torch.manual_seed(1)
    with pytest.raises(VisarError, match="is another one: vae "):
        train_mar(data, 8, still, KLAutoencoder(**SIZES).eval(), words, *sizes, start=start)


@pytest.mark.filterwarnings("ignore:Words not known")
def test_a_style_of_weight_0_is_never_taken(
    words: WordEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ImageSet(image_folder(tmp_path / "set", 8, ("flat", "noto")))
    taken: set[str] = set()
    call = LatentSamples.__call__

    def watched(self: LatentSamples, rows: list[int], g: Any, rng: Any = None, dropped: float = 0.0) -> Any:
        taken.update(data.records[i].style for i in rows if rng is not None)
        return call(self, rows, g, rng, dropped)

    monkeypatch.setattr(LatentSamples, "__call__", watched)
    train_mar(
        data, 8, config(tmp_path / "a", 3), KLAutoencoder(**SIZES).eval(), words, 32, 1, 1, 32, 1, weights={"noto": 0}
    )
    assert taken == {"flat"}


def test_the_command_line_trains_and_assembles(
    data: ImageSet, words: WordEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words.save_pretrained(tmp_path / "words")
    common = ["--data", str(data.path), "--size", "8", "--minutes", "0.0001", "--batch", "2", "--no-compile"]
    assert main(["train", "autoencoder", *common, "--out", str(tmp_path / "ae")]) == 0
    parts = ["--autoencoder", str(tmp_path / "ae" / "vae"), "--words", str(tmp_path / "words")]
    small = ["--dim", "32", "--layers", "1", "--heads", "1", "--head-width", "32", "--head-layers", "1"]
    on = ["--varied", "--init", str(tmp_path / "mar" / "mar")]
    for name, more in (("mar", []), ("draft", on)):
        assert main(["train", "mar", *common, *parts, *small, *more, "--out", str(tmp_path / name)]) == 0
    models = ["--mar", str(tmp_path / "mar" / "mar"), "--draft", str(tmp_path / "draft" / "mar")]
    assert main(["train", "assemble", *models, *parts, "--out", str(tmp_path / "model")]) == 0
    capsys.readouterr()
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "model")
    assert isinstance(pipe, TextToImagePipeline) and (tmp_path / "model" / "draft" / "config.json").exists()
    assert main(["train", "assemble", "--mar", "x", "--words", "y", "--out", str(tmp_path / "no")]) == 2
    assert "Give --gpt and --tokenizer, or --mar and --autoencoder" in capsys.readouterr().err
    assert main(["train", "mar", *common, *parts, "--dim", "30", "--heads", "4", "--out", str(tmp_path / "no")]) == 2
    assert "--dim must be a multiple of --heads" in capsys.readouterr().err
