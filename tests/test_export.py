"""Exported folders, loaded by transformers and PEFT, compute what the module computes."""

import base64
import json
import os
import shlex
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import huggingface_hub
import pytest
import torch
import yaml
from conftest import char_tokenizer, tiny_llama
from fitting import data, fit, module
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_grpo import GRPOModule
from lightning_grpo.cli import main
from lightning_grpo.errors import RunError, UserError
from lightning_grpo.export import Export, export, folder, read_checkpoint
from lightning_grpo.export.card import base_licence, model_card
from lightning_grpo.export.hub import push
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.policy.load import LoRA
from lightning_grpo.policy.pretrained import Pretrained
from lightning_grpo.rewards import PrefixMatch
from lightning_grpo.rollout.server.tcp import free_port
from lightning_grpo.rollout.vllm.callback import require_sendable

ROOT = Path(__file__).parent.parent


def train(root: Path, model: str, *, prompts=None, **settings) -> tuple[GRPOModule, Path]:
    """One optimizer step that moves every weight far, and its checkpoint."""
    large_steps = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-2)}
    policy = module(model, **large_steps | settings)
    fit(root, policy, prompts or data(), steps=2, callbacks=[Checkpoint()], enable_checkpointing=True)
    return policy, root / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_path) -> tuple[GRPOModule, Path]:
    """A run with whole weights. Don't change the module."""
    return train(tmp_path_factory.mktemp("run"), tiny_model_path)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, tiny_model_path) -> tuple[GRPOModule, Path]:
    return train(tmp_path_factory.mktemp("lora_run"), tiny_model_path, lora=LoRA(rank=4))


IDS = torch.randint(6, 80, (3, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logprobs(policy: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """[rows, length, vocabulary], under the same attention for all."""
    policy.eval()
    (policy.get_base_model() if isinstance(policy, PeftModel) else policy).set_attn_implementation("sdpa")
    return policy(input_ids=ids).logits.float().log_softmax(-1)


@pytest.mark.parametrize("kind", ["tiny_model_path", "untied_model_path"])
def test_whole_weights_in_transformers(kind, tmp_path, request):
    trained, checkpoint = train(tmp_path, request.getfixturevalue(kind))
    out = tmp_path / "out"
    export(checkpoint, out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32
    assert torch.equal(logprobs(loaded), logprobs(trained.policy))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], ["embed_tokens", "v_proj"]])
@pytest.mark.parametrize("kind", ["tiny_model_path", "untied_model_path"])
def test_lora_as_adapter_and_merged(kind, targets, tmp_path, request):
    trained, checkpoint = train(tmp_path, request.getfixturevalue(kind), lora=LoRA(rank=4, target_modules=targets))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    export(checkpoint, adapter)
    export(checkpoint, merged, merge=True)
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
    expected = logprobs(trained.policy)
    assert torch.equal(logprobs(loaded), expected)
    assert torch.allclose(logprobs(AutoModelForCausalLM.from_pretrained(merged)), expected, atol=1e-4)
    base = logprobs(AutoModelForCausalLM.from_pretrained(trained.model_path))
    assert (base - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "alpha_pattern": {"q_proj": 64.0}, "rank_pattern": {"k_proj": 2}},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens"], "exclude_modules": ["up_proj"]},
        {"modules_to_save": ["lm_head"], "layers_to_transform": [1], "target_modules": ["q_proj"]},
        {"init_lora_weights": "gaussian", "target_modules": "lm_head"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_of_lora(options, tmp_path, tiny_model_path):
    trained, checkpoint = train(tmp_path, tiny_model_path, lora=LoRA(rank=4, **options))
    expected = logprobs(trained.policy)
    assert torch.equal(logprobs(GRPOModule.load_from_checkpoint(checkpoint).policy), expected)
    export(checkpoint, tmp_path / "adapter")
    assert torch.equal(logprobs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    export(checkpoint, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logprobs(merged), expected, atol=1e-4)
    assert (logprobs(AutoModelForCausalLM.from_pretrained(tiny_model_path)) - expected).abs().max() > 0.1


def test_lora_that_a_sync_can_not_carry_is_refused_at_setup(tiny_model_path):
    for mode, options, named in [
        ("merged", {"options": {"lora_bias": True}}, "lora.options has lora_bias, .* or set the rollout to HFRollout"),
        ("adapter", {"use_dora": True}, "lora.use_dora is True; set rollout lora: merged"),
        ("adapter", {"options": {"bias": "all"}}, "lora.options.bias is all; set rollout lora: merged"),
        ("adapter", {"rank_pattern": {"q_proj": 2}}, "lora.rank_pattern is .*; set rollout lora: merged"),
        ("adapter", {"modules_to_save": ["lm_head"]}, "lora.modules_to_save is .*; set rollout lora: merged"),
    ]:
        with pytest.raises(UserError, match=named):
            require_sendable(module(tiny_model_path, lora=LoRA(**options)), mode)
    for options in ({"rank_pattern": {"q_proj": 2}}, {"use_dora": True}, {"options": {"bias": "all"}}):
        require_sendable(module(tiny_model_path, lora=LoRA(**options)), "merged")


# ── dtypes, sizes, what else is in the folder ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_round_once(dtype, run, tmp_path):
    export(run[1], tmp_path / "out", dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(loaded.dtype) == f"torch.{dtype}"
    for name, trained in run[0].policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], trained.to(loaded.dtype)), name


def test_a_policy_of_16_bits_stays_one(tmp_path, tiny_model_path):
    trained, checkpoint = train(tmp_path, tiny_model_path, dtype="bfloat16")
    export(checkpoint, tmp_path / "out")
    assert torch.equal(logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logprobs(trained.policy))


def test_tied_weights_are_stored_once_and_large_ones_in_several_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "SHARD_SIZE", "100KB")
    out = tmp_path / "out"
    export(run[1], out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"] and len(set(index["weight_map"].values())) > 2
    assert torch.equal(logprobs(AutoModelForCausalLM.from_pretrained(out)), logprobs(run[0].policy))


def test_tokenizer_template_and_generation_config(tmp_path, tokenizer):
    """A tokenizer with a token of its own, an embedding with more rows than tokens, and the run's chat template."""
    base, more = tmp_path / "base", char_tokenizer()
    more.add_tokens(["<think>"])
    tiny_llama(more, vocab_size=len(more) + 9).save_pretrained(base)
    more.save_pretrained(base)
    GenerationConfig(eos_token_id=[1, 5], pad_token_id=0, temperature=0.6, do_sample=True).save_pretrained(base)
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    trained, checkpoint = train(tmp_path, str(base), prompts=data(chat_template=template))
    out = tmp_path / "out"
    export(checkpoint, out)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded("<think>a").input_ids == more("<think>a").input_ids
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"
    policy = AutoModelForCausalLM.from_pretrained(out)
    assert policy.get_input_embeddings().num_embeddings == len(more) + 9
    assert policy.generation_config.eos_token_id == [1, 5] and policy.generation_config.temperature == 0.6
    assert torch.equal(logprobs(policy), logprobs(trained.policy))


def test_dropout_of_the_base_model_is_left_in_its_config(tmp_path, tokenizer):
    base = tmp_path / "base"
    tiny_llama(tokenizer, attention_dropout=0.25).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for lora in (None, LoRA(rank=2)):
        _, checkpoint = train(tmp_path / str(lora), str(base), lora=lora)
        export(checkpoint, tmp_path / "out", merge=lora and True, overwrite=True)
        assert AutoConfig.from_pretrained(tmp_path / "out").attention_dropout == 0.25


def test_an_adapter_on_random_weights_is_merged(tmp_path, tiny_model_path):
    trained, checkpoint = train(tmp_path, tiny_model_path, lora=LoRA(rank=2), from_scratch=True, seed=3)
    assert not export(checkpoint, tmp_path / "out").is_adapter
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logprobs(loaded), logprobs(trained.policy), atol=1e-4)
    with pytest.raises(UserError, match="has random weights, which are in no folder"):
        export(checkpoint, tmp_path / "other", merge=False)


# ── Loading a checkpoint without a Trainer ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["run", "lora_run"])
def test_a_module_from_a_checkpoint_generates(kind, request):
    trained, checkpoint = request.getfixturevalue(kind)
    loaded = GRPOModule.load_from_checkpoint(checkpoint)
    assert loaded.lora == trained.lora and not loaded.training
    assert torch.equal(logprobs(loaded.policy), logprobs(trained.policy))
    ids = loaded.policy.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(ids, trained.policy.generate(input_ids=IDS, max_new_tokens=4, do_sample=False))
    other = GRPOModule.load_from_checkpoint(checkpoint, rewards=[PrefixMatch()], num_generations=7, dtype="bfloat16")
    assert (other.num_generations, other.dtype_name, other.reward_names) == (7, "bfloat16", ["prefix_match"])


def test_another_adapter_than_the_checkpoints_is_refused(lora_run):
    with pytest.raises(UserError, match=r"lora is None and was LoRA\(rank=4"):
        GRPOModule.load_from_checkpoint(lora_run[1], lora=None)


# ── Wrong input ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_can_not_be_exported_is_refused(run, lora_run, tmp_path, untied_model_path):
    out, checkpoint = tmp_path / "out", run[1]
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    for arguments, options, named in [
        ((tmp_path / "absent.ckpt", out), {}, r"the checkpoint .*absent.ckpt does not exist"),
        ((tmp_path / "other", out), {}, r"other holds no checkpoint; name a .ckpt file"),
        ((tmp_path / "other" / "thesis.txt", out), {}, "is an empty file"),
        ((checkpoint, tmp_path / "file"), {}, "is a file; name a new folder"),
        ((checkpoint, tmp_path / "other"), {"overwrite": True}, "holds other files than a model's"),
        ((checkpoint, out), {"merge": True}, "holds whole weights, and no adapter; leave merge out"),
        ((checkpoint, out), {"merge": False}, "leave adapter out"),
        ((checkpoint, out), {"dtype": "int8"}, "dtype is 'int8'; set one of float32, bfloat16, float16"),
        ((checkpoint, out), {"model": untied_model_path}, r"it lacks 8 tensors.*its base model is not .*untied_model"),
        ((lora_run[1], out), {"model": str(tmp_path / "gone")}, "no such folder"),
        ((checkpoint, run[0].model_path), {"overwrite": True}, "is the base model's folder, which stays as it is"),
    ]:
        with pytest.raises(UserError, match=named):
            export(*arguments, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_an_earlier_model_is_replaced_only_if_asked(run, lora_run, tmp_path):
    out = tmp_path / "out"
    export(lora_run[1], out)
    with pytest.raises(UserError, match="holds a model already"):
        export(run[1], out)
    assert (out / "adapter_config.json").exists()
    export(run[1], out, overwrite=True)
    assert (out / "model.safetensors").exists() and not (out / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    checkpoint = torch.load(run[1], weights_only=True)
    checkpoint["state_dict"]["policy.model.norm.weight"][3] = 1e6
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"1 of its tensors have NaN or infinite values: model.norm.weight"):
        export(tmp_path / "a.ckpt", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_earlier_model(run, tmp_path, files_of_one_megabyte, monkeypatch):
    out = tmp_path / "out"
    export(run[1], out)
    before = (out / "README.md").read_bytes()
    monkeypatch.setattr(folder, "model_card", lambda *_, **__: "x" * 2**21)
    with pytest.raises(RunError, match="out could not be written: File too large"):
        export(run[1], out, overwrite=True)
    assert (out / "README.md").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoints_of_earlier_versions_need_the_model(run, tmp_path):
    checkpoint = torch.load(run[1], weights_only=True)
    checkpoint["policy"] = {name: checkpoint["policy"][name] for name in ("lora", "optimizer")}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a.ckpt doesn't record its base model.*command line: --model"):
        export(tmp_path / "a.ckpt", tmp_path / "out")
    export(tmp_path / "a.ckpt", tmp_path / "out", model=run[0].model_path)
    assert torch.equal(logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logprobs(run[0].policy))


# ── The card ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_card_names_base_licence_and_steps(run):
    saved = read_checkpoint(run[1])
    assert base_licence(saved.model) is None
    front, text = model_card(saved, is_adapter=False).removeprefix("---\n").split("---\n", 1)
    # a folder's name is no name on the hub, which refuses cards with such a base model
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["grpo", "reinforcement-learning", "lightning_grpo"],
    }  # fmt: skip
    assert f"`{Path(saved.model).name}`" in text and saved.model not in text and "2 optimizer steps" in text
    card = model_card(replace(saved, base=Pretrained(name="Qwen/Qwen2.5-0.5B")), is_adapter=True)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("# A\n---\n---\n", None),
        ("---\na: [\n---\n", None),
        ("---\n- a\n---\n", None),
    ],
)
def test_the_licence_of_the_base_model(readme, licence, tmp_path):
    (tmp_path / "README.md").write_text(readme)
    assert base_licence(str(tmp_path)) == licence


# ── The hub ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hub(monkeypatch):
    """What a local server in place of the hub was asked; it refuses tokens other than ``good``."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            asked.append((self.path, body))
            files = json.loads(body)["files"] if "/preupload/" in self.path else []
            url = f"{huggingface_hub.constants.ENDPOINT}/me/policy"
            answer = {
                "url": url, "commitUrl": f"{url}/commit/abc", "commitOid": "abc",
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files],
            }  # fmt: skip
            self.send_response(200 if self.headers["authorization"] == "Bearer good" else 401)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, daemon=True).start()
        yield asked
        server.shutdown()


def test_the_folder_is_uploaded(hub, run, tmp_path):
    out = tmp_path / "out"
    export(run[1], out)
    assert push(out, "me/policy", "good").endswith("/me/policy")
    created = next(json.loads(body) for path, body in hub if path == "/api/repos/create")
    assert (created["name"], created["organization"], created["visibility"]) == ("policy", "me", "private")
    commit = next(body for path, body in hub if path == "/api/models/me/policy/commit/main")
    lines = [json.loads(line)["value"] for line in commit.splitlines()]
    uploaded = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
    assert uploaded == {path.name: path.read_bytes() for path in out.iterdir()}


def test_what_the_hub_refuses_is_said(hub, tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"was written, but not uploaded to me/policy: .*401.*upload it by `hf upload"):
        push(tmp_path, "me/policy", "bad")
    with pytest.raises(UserError, match="push_to_hub is 'a/b/c', which is no name on the hub; set OWNER/NAME"):
        push(tmp_path, "a/b/c", "good")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    with pytest.raises(RunError, match=r"not uploaded to me/policy: .*refused"):
        push(tmp_path, "me/policy", "good")


# ── By fit itself ─────────────────────────────────────────────────────────────────────────────────────────────────────


def fit_and_export(root, policy, *, steps, checkpoint=None, **options):
    callbacks = [Checkpoint(every_n_train_steps=1, save_top_k=-1, **checkpoint or {}), Export(**options)]
    fit(root, policy, data(), steps=steps, callbacks=callbacks, enable_checkpointing=True)
    return root / "checkpoints"


@pytest.mark.parametrize(("worse", "best"), [(1.0, 1), (-1.0, 3)])
def test_fit_exports_last_and_best(worse, best, tmp_path, tiny_model_path, capsys):
    class Scored(GRPOModule):
        def training_step(self, *args):
            self.log("score", -worse * self.trainer.global_step)
            return super().training_step(*args)

    policy = module(tiny_model_path, Scored)
    checkpoints = fit_and_export(tmp_path, policy, steps=3, checkpoint={"monitor": "score"})
    for name, step in (("last", 3), ("best", best)):
        loaded = AutoModelForCausalLM.from_pretrained(checkpoints / name)
        saved = read_checkpoint(checkpoints / f"step-{step:06d}.ckpt").weights
        assert all(torch.equal(value, saved[key]) for key, value in loaded.state_dict().items())
    assert (checkpoints / "best").is_symlink() == (best == 3)
    assert f"model (last): {checkpoints / 'last'}\n" in capsys.readouterr().out
    # the folders are those of an earlier fit when the run goes on
    fit(tmp_path, module(tiny_model_path, Scored), steps=4, ckpt_path="last", enable_checkpointing=True, callbacks=[
        Checkpoint(every_n_train_steps=1, save_top_k=-1, monitor="score"), Export(),
    ])  # fmt: skip
    assert "4 optimizer steps" in (checkpoints / "last" / "README.md").read_text()
    assert (checkpoints / "best" / "model.safetensors").exists()


def test_what_fit_can_not_export_is_a_warning(tmp_path, tiny_model_path, caplog):
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    (tmp_path / "checkpoints" / "last" / "thesis.txt").write_text("")
    checkpoints = fit_and_export(tmp_path, module(tiny_model_path), steps=1)
    assert "was not exported to" in caplog.text and "holds other files than a model's" in caplog.text
    assert (checkpoints / "last.ckpt").exists()


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    main([
        "fit", "--config", "configs/smoke.yaml", "--trainer.default_root_dir", str(tmp_path),
        "--trainer.max_steps", "2", "--data.size", "28", "--data.validation_size", "2",
        "--trainer.limit_val_batches", "1.0", "--trainer.num_sanity_val_steps", "-1", "--export.dtype", "bfloat16",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert f"model (last): {tmp_path}/checkpoints/last\nuse it: " in printed
    card = (tmp_path / "checkpoints" / "last" / "README.md").read_text()
    for text in ("| training, mean of optimizer steps 1–1 and 2–2 | ", "| held-out reward, after step 2 | ",
                 "source: letters", "num_generations: 16", "- lightning_grpo.rewards.PrefixMatch"):  # fmt: skip
        assert text in card
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "last").dtype == torch.bfloat16
    main(["export", str(tmp_path), str(tmp_path / "out")])
    assert f"model: {tmp_path}/out\nuse it: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path), str(tmp_path / "out"), "--push_to_hub", "a/b"])
    assert (
        capsys.readouterr().err
        == "error: push_to_hub needs a token that may write: set the environment variable HF_TOKEN\n"
    )


# ── vLLM ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.vllm
@pytest.mark.slow
def test_the_printed_command_serves_base_and_adapter(run, tmp_path):
    """A policy with an adapter for it, trained in two runs one after the other, on one server."""
    trained, checkpoint = run
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    export(checkpoint, base)
    adapted, checkpoint = train(tmp_path, str(base), lora=LoRA(rank=4))
    command = export(checkpoint, adapter).next_command()
    with served([*shlex.split(command), "--dtype", "float32"], tmp_path) as url:
        for name, policy in ((str(base), trained.policy), ("policy", adapted.policy)):
            for ids in IDS.tolist():
                body = {"model": name, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
                given = [
                    token[str(t)]["logprob"]
                    for t, token in zip(ids[1:], answer["choices"][0]["prompt_logprobs"][1:], strict=True)
                ]
                expected = logprobs(policy, torch.tensor([ids]))[0, :-1].gather(1, torch.tensor(ids[1:])[:, None])
                assert given == pytest.approx(expected[:, 0].tolist(), abs=1e-3), name


@contextmanager
def served(command, folder):
    port = free_port("127.0.0.1")
    command = [*command, "--port", str(port), "--max-model-len", "64", "--enforce-eager", "--max-num-seqs", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                with suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").is_success:
                        break
                time.sleep(0.5)
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            yield url
        finally:
            process.terminate()
            process.wait(60)
