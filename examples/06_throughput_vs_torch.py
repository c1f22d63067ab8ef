"""Time training steps of the default model beside the same model in CPU PyTorch.

The twin is Hugging Face's MixtralForCausalLM of the same sizes (grouped_mm experts, SDPA
attention, its own auxiliary loss), torch.optim.AdamW and gradient clipping. Each
takes a few steps in turn, round after round, so that a drifting machine hits all alike; figures
are medians. The pause and the untimed step between two turns let OpenMP's spinning threads rest.

    pip install 'npmoe[cli,numba,parity]' && python examples/06_throughput_vs_torch.py
"""

import argparse
import contextlib
import functools
import statistics
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from npmoe.training import CharVocabulary, Trainer, batch, language_recipe, python_topics_text
from npmoe.training.loop import single_threaded_blas

STEPS_PER_TURN = 5


def build_twin(config, experts):
    model, moe = config.model, config.model.moe
    hf = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=moe.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        max_position_embeddings=model.context_length,
        tie_word_embeddings=model.tie_embeddings,
        output_router_logits=True,
        router_aux_loss_coef=model.load_balancing_coefficient,
        use_cache=False,
        attn_implementation="sdpa",
    )
    hf._experts_implementation = experts
    twin = MixtralForCausalLM(hf).train()
    optimizer = torch.optim.AdamW(
        twin.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    return twin, optimizer


def torch_step(twin, optimizer, inputs, targets):
    output = twin(input_ids=torch.from_numpy(inputs).long(), output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), torch.from_numpy(targets).long().flatten()
    )
    (loss + output.aux_loss * 0.01).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.workers)
    text = python_topics_text()
    config = language_recipe(text, "topics", steps=1000)
    ids = CharVocabulary(config.characters).encode(text)
    twins = {name: build_twin(config, name) for name in ("grouped_mm", "eager")}
    with single_threaded_blas():  # the worker processes are forked here and keep this limit
        trainers = {
            f"npmoe {name}": Trainer(config, ids, workers=options.workers, backend=name)
            for name in ("numpy", "numba")
        }
    times = {name: [] for name in (*trainers, *twins)}
    pair = batch(ids, config.model.context_length, config.batch_size, 0, 0)
    steps = {
        **{name: trainer.step for name, trainer in trainers.items()},
        **{n: functools.partial(torch_step, *twin, *pair) for n, twin in twins.items()},
    }
    for _ in range(options.rounds):
        for name, step in steps.items():
            time.sleep(0.3)
            with single_threaded_blas() if name in trainers else contextlib.nullcontext():
                step()
                for _ in range(STEPS_PER_TURN):
                    start = time.perf_counter()
                    step()
                    times[name].append(time.perf_counter() - start)
    for trainer in trainers.values():
        trainer.close()
    speed = {n: config.tokens_per_step / statistics.median(t) for n, t in times.items()}
    for name, value in speed.items():
        ratios = "  ".join(f"{n} / this = {speed[n] / value:.2f}" for n in trainers)
        print(f"{name:12s} {value:9,.0f} tokens/s   {ratios}")


if __name__ == "__main__":
    main()
