"""Drafters for decoders of transformers: what they draft is what they learn, and images keep their distribution."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.families.hf.grids import TEXT, expected_images
from tests.families.hf.worlds import WORLDS
from tests.helpers.recording import Recorder
from tests.helpers.tiny_chameleon import chameleon, chameleon_tokenizer, save, tiny_chameleon
from tests.helpers.tiny_hf import PROMPTS
from visar import cli
from visar.drafters import DRAFTERS, drafter_kind, drafter_kinds
from visar.engine.graphs import Graph
from visar.engine.guidance import Guidance
from visar.engine.loop import decode
from visar.engine.rng import Noise
from visar.engine.tree import Tree
from visar.errors import VisarError
from visar.eval.exactness.joint import chi_square_z, values
from visar.families.hf.chameleon import ChameleonFamily, LuminaFamily
from visar.families.hf.drafting import TransformersTarget
from visar.generation.model import ImageModel
from visar.generation.pool import Pool, Request
from visar.samplers import Target, get_sampler
from visar.training.drafter import train_drafter
from visar.training.loop import TrainConfig

KINDS = ("eagle", "medusa", "hydra")


def untrained(kind: str, target: TransformersTarget) -> Any:
    """A drafter that reads all that it is given."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = drafter_kind(kind).new(target, 3, 0).eval()
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize(
    ("world", "kind"),
    [("chameleon", kind) for kind in KINDS] + [(world, "eagle") for world in ("glm-image", "janus", "emu3")],
)
@torch.no_grad()
def test_a_drafter_drafts_what_it_was_trained_to_draft(world: str, kind: str) -> None:
    """The distributions of the training pass, over prompts padded on the left, are those of the drafter at work."""
    w = WORLDS[world]()
    encoded, guidance = w.condition([0, 1, 2]), Guidance(w.scale)
    target = TransformersTarget(w.decoder, 13)
    model = untrained(kind, target)
    made: Any = w.session([0, 1, 2], 6, 13, made=lambda *a, **k: session_of(model, *a, **k))
    drafter = drafter_kind(kind).attach(made, model, target, 3, 6, encoded)
    tokens = torch.randint(w.decoder.vocab - 1, (3, 13), generator=torch.Generator().manual_seed(0))
    loss_of = DRAFTERS[kind].loss
    assert loss_of is not None
    loss = loss_of(model, target, guidance, Target(), 3)
    draft_probs = list(loss.log_draft_probs(loss.run_target(*target.given(encoded), tokens)))
    for count in (1, 3, 4, 2):
        n = int(made.lengths[0])
        logits = [drafter.root(tokens, made.lengths)]
        logits += [drafter.extend(tokens[:, n + k - 1 : n + k], None, k) for k in (1, 2)]
        for k, found in enumerate(logits):
            own = found[:, 0].log_softmax(-1)
            torch.testing.assert_close(own, draft_probs[k][:, n + k], atol=2e-4, rtol=1e-4)
        root = tokens[:, max(n - 1, 0) : max(n - 1, 0) + 1]
        made.forward(torch.cat([root, tokens[:, n : n + 4]], dim=1))
        made.commit(torch.full((3,), count))
    assert drafter.seconds > 0 and drafter.bytes_read > 0


def session_of(model: Any, *arguments: Any, **keywords: Any) -> Any:
    from visar.families.hf.session import TransformersSession

    aux = drafter_kind(model.kind).aux_layers(model)
    return TransformersSession(*arguments, **keywords, aux_layers=aux)


@pytest.mark.parametrize("kind", ("eagle", "hydra"))
@torch.no_grad()
def test_a_node_is_drafted_as_the_end_of_a_chain(kind: str) -> None:
    """Behind a node of a tree, each row with a tree of its own, as behind the chain that leads there."""
    w = WORLDS["chameleon"]()
    target = TransformersTarget(w.decoder, 13)
    model = untrained(kind, target)
    tokens = torch.randint(4, (3, 13), generator=torch.Generator().manual_seed(1))
    drafts = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(2))
    parents = torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 0, 2, 1], [-1, 0, 0, 1, 1]])

    def started() -> Any:
        made = w.session([0, 1, 2], 8, 13, made=lambda *a, **k: session_of(model, *a, **k))
        drafter = drafter_kind(kind).attach(made, model, target, 3, 8, w.condition([0, 1, 2]))
        drafter.root(tokens, made.lengths)
        made.forward(torch.cat([tokens[:, :1], tokens[:, :3]], dim=1))
        made.commit(torch.full((3,), 2))
        drafter.root(tokens, made.lengths)
        return drafter

    drafter, tree = started(), Tree.of(parents, 2)
    first, second = drafter.extend(drafts[:, 1:3], tree, 1), drafter.extend(drafts[:, 3:], tree, 3)
    for node in range(1, 5):
        other = started()
        paths = [[n for n in (int(p[node]), node) if n > 0] for p in parents]
        path = torch.tensor(paths)
        found = [other.extend(drafts.gather(1, path[:, k : k + 1]), None, k + 1) for k in range(path.shape[1])][-1]
        wanted = torch.cat([first, second], 1)[:, node - 1 : node]
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_greedy_tokens_are_those_of_sampling_without_a_drafter(tmp_path: Path) -> None:
    family = LuminaFamily(*chameleon(True), size=(32, 64))
    model = ImageModel(family)
    untrained("eagle", family.drafting).save_pretrained(tmp_path / "eagle")
    model.drafters.load(tmp_path / "eagle")
    greedily = model.params_of(top_k=1, top_p=1.0)
    wanted, found = (
        model.generate(list(PROMPTS), greedily, sampler=name, output_type="tokens") for name in ("ar", "eagle")
    )
    assert torch.equal(found.tokens, wanted.tokens) and found.stats.exact
    assert found.stats.draft_seconds is not None and found.stats.draft_seconds > 0


@pytest.mark.slow
def test_rows_that_are_taken_in_turns(tmp_path: Path) -> None:
    family = LuminaFamily(*chameleon(True), size=(32, 64))
    model = ImageModel(family)
    untrained("eagle", family.drafting).save_pretrained(tmp_path / "eagle")
    model.drafters.load(tmp_path / "eagle")
    requests = [Request(text, model.params_of(seed=i), tag=i) for i, text in enumerate(PROMPTS)]
    for done in Pool(model, "eagle2", size=2).run(requests):
        r = done.request
        alone = model.generate(r.condition, r.params, sampler="eagle2", output_type="tokens")
        assert torch.equal(done.tokens, alone.tokens[0]) and done.nfe == alone.stats.nfe


@pytest.mark.slow
@torch.inference_mode()
def test_passes_of_a_drafter_are_recorded_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    w = WORLDS["chameleon"]()
    target = TransformersTarget(w.decoder, 8)
    head, record = untrained("eagle", target), Recorder(monkeypatch)
    sampler: Any = get_sampler("eagle")

    def tokens(graph: Graph | None) -> Tensor:
        made: Any = w.session([0, 1, 2], sampler.window, 8, made=lambda *a, **k: session_of(head, *a, **k))
        made.drafter = drafter_kind("eagle").attach(
            made, head, target, sampler.depth, sampler.window, w.condition([0, 1, 2])
        )
        return decode(made, sampler, Target(), Noise(3, torch.arange(3)), graph=graph).tokens

    assert torch.equal(tokens(Graph(record)), tokens(None)) and record.captures == 1


@pytest.mark.slow
@torch.inference_mode()
def test_joint_distribution_of_a_tree_with_an_eagle_drafter() -> None:
    """Images of Lumina-mGPT, whose rows end in a forced token."""
    made = tiny_chameleon(codes=3, lumina=True)
    made.lm_head.weight /= 4
    small = LuminaFamily(made, chameleon_tokenizer(codes=3), size=(32, 32))
    expected = expected_images(small, lambda ids: made.lm_head(made.model(ids)[0]))
    sampler: Any = get_sampler("eagle")
    target = Target(0.9, forced=small.forced, allowed=small.allowed)
    kind, head, parts = drafter_kind("eagle"), untrained("eagle", small.drafting), list[Tensor]()
    for images in torch.arange(8192).split(1024):
        encoded = small.encode([TEXT] * len(images))
        session: Any = small.session(
            encoded, window=sampler.window, guidance=Guidance(3.0), aux_layers=kind.aux_layers(head)
        )
        session.layout = small.layout
        session.drafter = kind.attach(session, head, small.drafting, sampler.depth, sampler.window, encoded)
        parts.append(decode(session, sampler, target, Noise(7, images)).tokens)
    tokens = torch.cat(parts)
    assert (tokens[:, [2, 5]] == 3).all()
    counts = np.bincount(values(tokens[:, [0, 1, 3, 4]], 3), minlength=81)
    assert abs(chi_square_z(counts, expected)) < 4


@pytest.mark.slow
def test_a_trained_drafter_is_accepted_more_often(tmp_path: Path) -> None:
    family = LuminaFamily(*chameleon(True), size=(32, 32))
    model = ImageModel(family)
    target = family.drafting
    tokens = model.generate(list(PROMPTS) * 8, seed=0, output_type="tokens", guidance_scale=2.0, top_k=0).tokens
    config = TrainConfig(tmp_path, minutes=1e3, steps=40, batch=4, lr=3e-3, warmup=10, ema=0.9, compile=False)

    def of(rows: list[int]) -> tuple[Tensor, Tensor]:
        return target.given(family.encode([PROMPTS[i % 3] for i in rows]))

    train_drafter("eagle", target, of, tokens, config, Guidance(2.0), Target(), depth=2)
    rows = [json.loads(row) for row in (tmp_path / "eagle-run" / "log.jsonl").read_text().splitlines()]
    accepted = [row["acceptance_1"] for row in rows if "acceptance_1" in row]
    assert accepted[-1] > 0.5


@pytest.mark.slow
def test_the_command_line_trains_and_takes_a_drafter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(folder := tmp_path / "Lumina-mGPT-7B-512", lumina=True)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    model = ["--model", str(folder), "--image-size", "96x64"]
    train = ["train", "drafter", *model, "--captions", str(tmp_path / "prompts.txt"), "--kind", "eagle", "-n", "6"]
    more = ["--batch", "2", "--steps", "2", "--depth", "2", "--no-compile", "--out", str(tmp_path / "run")]
    assert cli.main([*train, *more]) == 0
    for sampler in ("eagle", "lantern", "lantern++"):
        out = ["-o", str(tmp_path / f"{sampler}.png"), "--drafter", str(tmp_path / "run" / "eagle"), "--json"]
        capsys.readouterr()
        assert cli.main(["generate", "a red heart", *model, "--sampler", sampler, *out]) == 0
        assert json.loads(capsys.readouterr().out)["sampler"] == sampler


@pytest.mark.parametrize("kind", sorted(set(drafter_kinds()) - set(KINDS)))
def test_drafters_made_of_the_models_layers_are_refused(kind: str, tmp_path: Path) -> None:
    target = ChameleonFamily(*chameleon()).drafting
    with pytest.raises(
        VisarError, match=rf"takes no drafter of the kind '{kind}'; it takes eagle, hydra, medusa|eagle"
    ):
        train_drafter(
            kind, target, lambda rows: target.given(()), torch.zeros(4, 9), TrainConfig(tmp_path), Guidance(), Target()
        )
    assert not list(tmp_path.iterdir())


def test_drafters_of_other_models_are_refused(tmp_path: Path) -> None:
    model = ImageModel(ChameleonFamily(*chameleon()))
    untrained("eagle", TransformersTarget(other(), 9)).save_pretrained(tmp_path / "eagle")
    with pytest.raises(VisarError, match="trained for another target"):
        model.drafters.load(tmp_path / "eagle")
    torch.save({"weight": torch.ones(2)}, tmp_path / "file.pt")
    with pytest.raises(VisarError, match="holds no drafter for a model of transformers"):
        model.drafters.load(tmp_path / "file.pt")
    w = WORLDS["mistral"]()
    with pytest.raises(VisarError, match="layers that visar knows, and this model has others"):
        drafter_kind("eagle").new(TransformersTarget(w.decoder, 9), 3, 0)


def released(model: Any) -> dict[str, Tensor]:
    """A drafter's tensors by the keys that LANTERN's trainer writes for a Chameleon."""
    g = torch.Generator().manual_seed(1)
    c, dim = model.config, model.config.hidden_size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * shape[-1] ** -0.5

    heads = c.num_attention_heads
    state = {"embed_tokens.weight": model.model.embed_tokens.weight.clone(), "fc.weight": random(dim, 2 * dim)}
    state |= {f"layers.0.self_attn.{part}_proj.weight": random(dim, dim) for part in "qkvo"}
    for part in "qk":
        state[f"layers.0.self_attn.{part}_norm.weight"] = 1 + random(heads, dim // heads)
        state[f"layers.0.self_attn.{part}_norm.bias"] = random(heads, dim // heads)
    state |= {f"layers.0.mlp.{part}_proj.weight": random(40, dim) for part in ("gate", "up")}
    state |= {"layers.0.mlp.down_proj.weight": random(dim, 40), "fc.bias": random(dim)}
    return state | {f"layers.0.{part}_layernorm.weight": 1 + random(dim) for part in ("input", "post_attention")}


def predicted(w: dict[str, Tensor], model: Any, ids: Tensor) -> Tensor:
    """Logits [T - 1, V] after ids[1:], by transformers' Chameleon and a layer of its class with a drafter's weights."""
    from transformers.models.chameleon.modeling_chameleon import ChameleonDecoderLayer

    hidden = model.model(ids[None])[0]
    layer = ChameleonDecoderLayer(model.config, 0)
    layer.mlp = type(layer.mlp)(type(model.config)(**{**model.config.to_dict(), "intermediate_size": 40}))
    own = {key.removeprefix("layers.0."): value for key, value in w.items() if key.startswith("layers.0.")}
    layer.load_state_dict(own)
    x = torch.cat([w["embed_tokens.weight"][ids[None, 1:]], hidden[:, :-1]], -1) @ w["fc.weight"].T + w["fc.bias"]
    at = torch.arange(x.shape[1])[None]
    causal = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    out = layer.eval()(x, attention_mask=causal, position_embeddings=model.model.rotary_emb(x, at))[0]
    logits: Tensor = model.lm_head(out.view(x.shape))[0]
    return logits


@torch.no_grad()
def test_a_released_drafter_of_lantern_drafts_as_its_layer_does(tmp_path: Path) -> None:
    model = ImageModel(ChameleonFamily(*chameleon()))
    family: Any = model.family
    state = released(family.model)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "chameleon"}')
    model.drafters.load(tmp_path)
    head = model.drafters.loaded["eagle"]
    encoded = family.encode(PROMPTS[:1])
    made = family.session(encoded[:2], window=6, guidance=Guidance(1.0), aux_layers=())
    drafter = drafter_kind("eagle").attach(made, head, family.drafting, 3, 6, encoded[:2])
    tokens = torch.tensor([[3, 1, 9, 9, 2, 7, 0, 5, 11]])
    ids = torch.cat([encoded[0][0, : encoded[1][0]], family.decoder.codes[tokens[0]]])
    for count in (2, 3, 1):
        n = int(made.lengths[0])
        wanted = predicted(state, family.model, ids[: int(encoded[1][0]) + n])[-1, family.decoder.codes]
        torch.testing.assert_close(drafter.root(tokens, made.lengths)[0, 0], wanted, atol=2e-4, rtol=1e-4)
        made.forward(torch.cat([tokens[:, max(n - 1, 0) :][:, :1], tokens[:, n : n + 3]], dim=1))
        made.commit(torch.full((1,), count))
    out = model.generate(PROMPTS[0], sampler="lantern", output_type="tokens")
    assert out.stats.sampler == "lantern" and not out.stats.exact
    for spoil, message in (
        (lambda s: s.pop("layers.0.input_layernorm.weight"), "input_layernorm.weight' is missing"),
        (lambda s: s.update({"layers.0.self_attn.q_norm.weight": torch.ones(8)}), r"q_norm\.weight' .* shape \[8\]"),
    ):
        spoil(damaged := dict(state))
        torch.save(damaged, tmp_path / "pytorch_model.bin")
        with pytest.raises(VisarError, match=message):
            model.drafters.load(tmp_path)


def other() -> Any:
    return ChameleonFamily(tiny_chameleon(seed=3), chameleon_tokenizer()).decoder
