"""The peer's process for train_speed.py and decode_speed.py: plain PyTorch and Hugging Face transformers."""

import json
import sys
from collections.abc import Callable

import numpy as np
import torch
from shapes import OPTIMIZER, SCHEDULE, token_batch
from torch_gpt import Gpt, GptConfig, learning_rate, load_jaxllm, make_optimizer, train_step
from workers import measured, serve


def training(settings: dict) -> dict[str, Callable[..., dict]]:
    """Handlers that train a Gpt of `settings["shape"]`."""
    shape, rows, total = settings["shape"], settings["rows"], settings["steps"]
    model = Gpt(GptConfig(**shape))
    compiled = torch.compile(model) if settings["compile"] else model
    optimizer = make_optimizer(model, OPTIMIZER)
    done = 0

    def load(path: str) -> dict:
        load_jaxllm(model, path)
        return {"parameters": sum(weight.numel() for weight in model.parameters())}

    def run(steps: int) -> dict:
        nonlocal done
        losses = []
        for _ in range(steps):
            row = torch.from_numpy(token_batch(done, rows, shape["max_seq_len"], shape["vocab_size"]))
            lr = learning_rate(done, total, OPTIMIZER["lr"], SCHEDULE)
            losses.append(train_step(compiled, optimizer, row[:, :-1], row[:, 1:], lr, OPTIMIZER["clip"])[0])
            done += 1
        return {"losses": [float(loss) for loss in losses]}

    return {"load": load, "run": lambda steps: measured(lambda: run(steps))}


def decoding(settings: dict) -> dict[str, Callable[..., dict]]:
    """Handlers that decode greedily with LlamaForCausalLM.generate."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = settings["shape"]
    config = LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["d_model"], intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["n_layers"], num_attention_heads=shape["n_heads"],
        max_position_embeddings=shape["max_seq_len"], rms_norm_eps=1e-6, tie_word_embeddings=shape["tie_embeddings"],
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()

    def load(path: str) -> dict:
        names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
        table = {f"attention/{ours}/kernel": name for ours, name in names.items()}
        table |= {f"ffn/{name}/kernel": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
        table |= {"attention_norm/scale": "input_layernorm", "ffn_norm/scale": "post_attention_layernorm"}
        state = {}
        for name, array in np.load(path).items():
            if name.startswith("blocks/"):
                key = table[name.removeprefix("blocks/")]
                for layer, part in enumerate(array):
                    state[f"model.layers.{layer}.{key}.weight"] = part
            else:
                key = {"embed/table": "model.embed_tokens", "final_norm/scale": "model.norm", "head": "lm_head"}[name]
                state[f"{key}.weight"] = array
        wanted = model.state_dict()
        for name, array in state.items():
            shape = wanted[name].shape
            if array.ndim > 1 and "embed" not in name and "lm_head" not in name:  # ours is [in, out], theirs [out, in]
                array = array.reshape(shape[1], shape[0]).T
            state[name] = torch.from_numpy(np.ascontiguousarray(array))
        missing = model.load_state_dict(state, strict=False).missing_keys
        if set(missing) - {"lm_head.weight"} or (missing and not config.tie_word_embeddings):
            raise ValueError(f"{path} lacks {missing}; write it with jax_worker.py of the same shape")
        model.tie_weights()
        return {"parameters": sum(weight.numel() for weight in model.parameters())}

    @torch.inference_mode()
    def run(prompt: list[int], new_tokens: int) -> dict:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
        return {"tokens": output[0, len(prompt) :].tolist()}

    return {"load": load, "run": lambda **request: measured(lambda: run(**request))}


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    if settings.get("threads"):
        torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    handlers = training(settings) if settings["task"] == "train" else decoding(settings)
    serve(handlers, ("torch", "transformers", "numpy"))
