#!/usr/bin/env python3
"""Writes tiny random Llama checkpoints and what Hugging Face transformers computes with them.

    python3 -m venv /tmp/golden-venv
    /tmp/golden-venv/bin/pip install torch==2.11.0 transformers==5.23.0 safetensors
    /tmp/golden-venv/bin/python scripts/golden/make_llama_goldens.py models/cpu/tests/golden

Each directory is a checkpoint (config.json, safetensors) plus

    expected.json   prompt ids, 64 greedy ids, the smallest gap between the best and the second-best logit, versions
    logits.f32      logits of every prompt position, f32 little-endian, [prompt, vocab]

The reference computes in f32 whatever the width in which weights are stored. Everything is seeded; a case is drawn again
(next seed) until no greedy choice is close, so that "64 ids equal" tests the model and not the last bit of a tie.
The files are checked in; neither Python nor PyTorch is needed to run the tests.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT_TOKENS = 41
GREEDY_TOKENS = 64
MIN_GAP = 2e-2

# Odd sizes on purpose: no dimension is a multiple of a register, heads * head_dim mostly differs from hidden_size.
CASES = {
    "f32_gqa_tied": dict(
        config=dict(vocab_size=131, hidden_size=42, intermediate_size=75, num_hidden_layers=2, num_attention_heads=6,
                    num_key_value_heads=3, head_dim=10, tie_word_embeddings=True),
        dtype=torch.float32),
    "f32_untied_sharded": dict(
        config=dict(vocab_size=97, hidden_size=52, intermediate_size=81, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=1, head_dim=14, tie_word_embeddings=False, rope_theta=500000.0),
        dtype=torch.float32, max_shard_size="40KB"),
    "bf16_mha_tied": dict(
        config=dict(vocab_size=259, hidden_size=60, intermediate_size=93, num_hidden_layers=2, num_attention_heads=5,
                    num_key_value_heads=5, tie_word_embeddings=True),
        dtype=torch.bfloat16),
    "f16_biases_sharded": dict(
        config=dict(vocab_size=113, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=9,
                    num_key_value_heads=3, head_dim=18, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        dtype=torch.float16, max_shard_size="30KB"),
    "f32_llama3_rope": dict(
        config=dict(vocab_size=89, hidden_size=40, intermediate_size=66, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=22, tie_word_embeddings=True, max_position_embeddings=512,
                    rope_scaling=dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                      original_max_position_embeddings=64)),
        dtype=torch.float32),
    "f32_linear_rope": dict(
        config=dict(vocab_size=89, hidden_size=40, intermediate_size=66, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, tie_word_embeddings=True,
                    rope_scaling=dict(rope_type="linear", factor=2.5)),
        dtype=torch.float32),
}


def draw(case, seed):
    """A random model in the stored width, with weights large enough that attention and logits are far from uniform."""
    torch.manual_seed(seed)
    options = dict(max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, initializer_range=0.25)
    model = LlamaForCausalLM(LlamaConfig(**{**options, **case["config"]}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.6, 1.4)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    return model.to(case["dtype"])


def reference(directory, prompt):
    """Prompt logits, greedy ids, smallest gap; plain f32, no cache, one sequence.

    Read back from disk: narrowing a model in memory would narrow its rotary frequencies as well.
    """
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    ids, gap, prefill = list(prompt), float("inf"), None
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            prefill = logits if prefill is None else prefill
            best = torch.topk(logits[-1], 2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
    return prefill, ids[len(prompt):], gap


def make(name, case, root):
    directory = root / name
    shutil.rmtree(directory, ignore_errors=True)
    for seed in range(1, 500):
        model = draw(case, seed)
        prompt = torch.randint(0, model.config.vocab_size, (PROMPT_TOKENS,)).tolist()
        model.save_pretrained(directory, max_shard_size=case.get("max_shard_size", "1GB"))
        logits, greedy, gap = reference(directory, prompt)
        # A greedy text that falls into a short loop tests little.
        if gap >= MIN_GAP and len(set(greedy)) >= 12:
            break
        shutil.rmtree(directory)
    else:
        sys.exit(f"{name}: no seed gives clear greedy choices")
    (directory / "generation_config.json").unlink(missing_ok=True)
    logits.contiguous().numpy().astype("<f4").tofile(directory / "logits.f32")
    expected = dict(prompt=prompt, greedy=greedy, smallest_gap=gap, seed=seed, torch=torch.__version__,
                    transformers=transformers.__version__)
    (directory / "expected.json").write_text(json.dumps(expected) + "\n")
    for file in directory.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(f"{name}: seed {seed}, gap {gap:.3f}, {len(set(greedy))} different ids, {size / 1024:.0f} KB")


def main():
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, case in CASES.items():
        make(name, case, root)


if __name__ == "__main__":
    main()
