#!/usr/bin/env python3
"""Writes a Llama checkpoint of random weights twice: in Hugging Face's layout, and as GGUF for llama.cpp.

    scripts/random_model.py --out DIR [--gguf FILE] [--dtype f32|bf16] [--hidden N] [--layers N] ...

The default shape is SmolLM2-135M's. Speed does not depend on what the weights are, so a comparison needs no download; both
files hold the same numbers, so the two programs must also agree on the tokens. The same seed and shape give the same bytes.
Every weight is exact in bf16, so that an f32 and a bf16 checkpoint are the same model. Standard library only.
"""

import argparse
import hashlib
import json
import math
import pathlib
import struct
import sys

BOS, EOS = 1, 2
# What SentencePiece models begin with: unknown, the two ends of a text, and one token per byte.
SPECIALS = ["<unk>", "<s>", "</s>"]
FIRST_WORD = len(SPECIALS) + 256
# Of the GGUF format: types of metadata values and tensors, kinds of tokens, and the alignment of the data.
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
GGML_F32 = 0
TOKEN_NORMAL, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_BYTE = 1, 2, 3, 6
ALIGNMENT = 32
ONE_BF16 = 0x3F80


class ModelError(Exception):
    """What cannot be written, and why."""


def main():
    args = parse_args()
    try:
        check(args)
        write_checkpoint(args)
        if args.gguf:
            write_gguf(args)
    except (ModelError, OSError) as error:
        sys.exit(f"error: {error}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--gguf", type=pathlib.Path, help="GGUF file to write, always in f32")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="of model.safetensors (default: f32)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rope-theta", type=float, default=100000.0)
    parser.add_argument("--rms-norm-eps", type=float, default=1e-5)
    parser.add_argument("--untied", action="store_true", help="an output matrix of its own")
    return parser.parse_args()


def check(args):
    sizes = ["hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "context"]
    for size in sizes:
        if getattr(args, size) < 1:
            raise ModelError(f"--{size.replace('_', '-')} must be at least 1")
    if args.heads % args.kv_heads:
        raise ModelError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    if args.head_dim % 2:
        raise ModelError(f"--head-dim {args.head_dim} is odd; rotary embedding turns pairs")
    if args.vocab < FIRST_WORD:
        raise ModelError(f"--vocab {args.vocab} has no room for the special and byte tokens: at least {FIRST_WORD}")


# The model: a list of tensors, and the bits of each.


class Tensor:
    """One weight: its names in the two formats, its shape (outputs first), and whether rotary embedding turns its rows."""

    def __init__(self, name, gguf_name, shape, rotary_heads=0):
        self.name, self.gguf_name, self.shape, self.rotary_heads = name, gguf_name, shape, rotary_heads
        self.count = math.prod(shape)


def tensors(args):
    """Every tensor, in the order in which both files hold them."""
    hidden, inner = args.hidden, args.intermediate
    q_rows, kv_rows = args.heads * args.head_dim, args.kv_heads * args.head_dim
    yield Tensor("model.embed_tokens.weight", "token_embd.weight", (args.vocab, hidden))
    for layer in range(args.layers):
        for name, gguf_name, shape, rotary_heads in [
            ("input_layernorm", "attn_norm", (hidden,), 0),
            ("self_attn.q_proj", "attn_q", (q_rows, hidden), args.heads),
            ("self_attn.k_proj", "attn_k", (kv_rows, hidden), args.kv_heads),
            ("self_attn.v_proj", "attn_v", (kv_rows, hidden), 0),
            ("self_attn.o_proj", "attn_output", (hidden, q_rows), 0),
            ("post_attention_layernorm", "ffn_norm", (hidden,), 0),
            ("mlp.gate_proj", "ffn_gate", (inner, hidden), 0),
            ("mlp.up_proj", "ffn_up", (inner, hidden), 0),
            ("mlp.down_proj", "ffn_down", (hidden, inner), 0),
        ]:
            yield Tensor(f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{gguf_name}.weight", shape, rotary_heads)
    yield Tensor("model.norm.weight", "output_norm.weight", (hidden,))
    if args.untied:
        yield Tensor("lm_head.weight", "output.weight", (args.vocab, hidden))


def halves(tensor, seed):
    """The low and the high byte of every element as bf16.

    A random byte picks one of 256 evenly spaced values; translate() turns all of them at once, where a loop over the
    elements would take minutes. The stream is the tensor's own, so that it depends on neither order nor other shapes.
    """
    if len(tensor.shape) == 1:
        return bytes([ONE_BF16 & 0xFF]) * tensor.count, bytes([ONE_BF16 >> 8]) * tensor.count
    # The variance is 1 / fan-in: a product with a row of unit variance has unit variance.
    limit = math.sqrt(3 / tensor.shape[1])
    levels = [bf16(limit * ((2 * byte + 1) / 256 - 1)) for byte in range(256)]
    stream = hashlib.shake_128(f"{seed}/{tensor.name}".encode()).digest(tensor.count)
    return stream.translate(bytes(v & 0xFF for v in levels)), stream.translate(bytes(v >> 8 for v in levels))


def bf16(value):
    """The bits of the nearest bf16."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return (bits + 0x8000) >> 16


def as_bf16(low, high):
    out = bytearray(2 * len(low))
    out[0::2], out[1::2] = low, high
    return out


def as_f32(low, high):
    # A bf16 is the upper half of an f32.
    out = bytearray(4 * len(low))
    out[2::4], out[3::4] = low, high
    return out


# Hugging Face's layout.


def write_checkpoint(args):
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "config.json", config(args))
    write_json(args.out / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    write_json(args.out / "tokenizer.json", tokenizer(args.vocab))
    write_json(args.out / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    with open(args.out / "model.safetensors", "wb") as file:
        file.write(safetensors_header(args))
        convert = as_f32 if args.dtype == "f32" else as_bf16
        for tensor in tensors(args):
            file.write(convert(*halves(tensor, args.seed)))


def config(args):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": args.context,
        "rms_norm_eps": args.rms_norm_eps,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": not args.untied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}[args.dtype],
    }


def tokenizer(vocab):
    """The tokenizer of SentencePiece models in the layout of tokenizer.json: bytes, and words that nothing merges into."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": token, "special": True, **plain} for i, token in enumerate(SPECIALS)]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(vocabulary(vocab))},
            "merges": [],
        },
    }


def vocabulary(vocab):
    return [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *(f"\u2581w{i}" for i in range(FIRST_WORD, vocab))]


def safetensors_header(args):
    size = {"f32": 4, "bf16": 2}[args.dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors(args):
        start, end = end, end + tensor.count * size
        header[tensor.name] = {"dtype": args.dtype.upper(), "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# GGUF.


def write_gguf(args):
    args.gguf.parent.mkdir(parents=True, exist_ok=True)
    with open(args.gguf, "wb") as file:
        file.write(gguf_header(args))
        for tensor in tensors(args):
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            data = as_f32(*halves(tensor, args.seed))
            file.write(rotary_pairs(tensor, data) if tensor.rotary_heads else data)
        file.write(b"\0" * (-file.tell() % ALIGNMENT))


def rotary_pairs(tensor, data):
    """Rows in llama.cpp's order: it turns neighbouring rows of a head, Hugging Face's layout turns row i with row i + half."""
    row_bytes = 4 * tensor.shape[1]
    head_rows = tensor.shape[0] // tensor.rotary_heads
    order = [
        head * head_rows + half * (head_rows // 2) + row
        for head in range(tensor.rotary_heads)
        for row in range(head_rows // 2)
        for half in (0, 1)
    ]
    view = memoryview(data)
    return b"".join(view[row * row_bytes : (row + 1) * row_bytes] for row in order)


def gguf_header(args):
    metadata = gguf_metadata(args)
    listed, offset = [], 0
    for tensor in tensors(args):
        # GGUF names the fastest dimension first.
        shape = tensor.shape[::-1]
        listed.append(text(tensor.gguf_name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, GGML_F32, offset))
        offset += 4 * tensor.count
        offset += -offset % ALIGNMENT
    header = b"GGUF" + struct.pack("<IQQ", 3, len(listed), len(metadata))
    header += b"".join(text(key) + value for key, value in metadata.items()) + b"".join(listed)
    return header + b"\0" * (-len(header) % ALIGNMENT)


def gguf_metadata(args):
    words = args.vocab - FIRST_WORD
    scores = [-float(i) for i in range(args.vocab)]
    kinds = [TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_CONTROL, *[TOKEN_BYTE] * 256, *[TOKEN_NORMAL] * words]
    return {
        "general.architecture": string("llama"),
        "general.name": string("random"),
        "general.alignment": number(U32, "I", ALIGNMENT),
        "general.file_type": number(U32, "I", 0),
        "llama.vocab_size": number(U32, "I", args.vocab),
        "llama.context_length": number(U32, "I", args.context),
        "llama.embedding_length": number(U32, "I", args.hidden),
        "llama.block_count": number(U32, "I", args.layers),
        "llama.feed_forward_length": number(U32, "I", args.intermediate),
        "llama.attention.head_count": number(U32, "I", args.heads),
        "llama.attention.head_count_kv": number(U32, "I", args.kv_heads),
        "llama.attention.key_length": number(U32, "I", args.head_dim),
        "llama.attention.value_length": number(U32, "I", args.head_dim),
        "llama.attention.layer_norm_rms_epsilon": number(F32, "f", args.rms_norm_eps),
        "llama.rope.dimension_count": number(U32, "I", args.head_dim),
        "llama.rope.freq_base": number(F32, "f", args.rope_theta),
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.pre": string("default"),
        "tokenizer.ggml.tokens": array(STRING, map(text, vocabulary(args.vocab)), args.vocab),
        "tokenizer.ggml.scores": array(F32, [struct.pack(f"<{args.vocab}f", *scores)], args.vocab),
        "tokenizer.ggml.token_type": array(I32, [struct.pack(f"<{args.vocab}i", *kinds)], args.vocab),
        "tokenizer.ggml.unknown_token_id": number(U32, "I", 0),
        "tokenizer.ggml.bos_token_id": number(U32, "I", BOS),
        "tokenizer.ggml.eos_token_id": number(U32, "I", EOS),
        "tokenizer.ggml.add_bos_token": number(BOOL, "?", False),
        "tokenizer.ggml.add_eos_token": number(BOOL, "?", False),
        "tokenizer.ggml.add_space_prefix": number(BOOL, "?", False),
    }


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def string(value):
    return struct.pack("<I", STRING) + text(value)


def number(kind, code, value):
    return struct.pack(f"<I{code}", kind, value)


def array(kind, parts, count):
    return struct.pack("<IIQ", ARRAY, kind, count) + b"".join(parts)


if __name__ == "__main__":
    main()
