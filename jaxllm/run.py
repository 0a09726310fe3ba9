"""The parts of one run, and what is done with them between steps: validation, samples, checkpoints.

Here text (data, tokenizer, samples) and training meet.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.core.bucket import here, named, push
from jaxllm.core.wording import count, short
from jaxllm.data.chat import encode_chat
from jaxllm.data.describe import segments
from jaxllm.data.loader import AnyBatch, DataExhausted, Loader
from jaxllm.data.shards import read_manifest
from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.encoder import Encoder
from jaxllm.encoder_decoder import EncoderDecoder
from jaxllm.evaluation.likelihood import evaluate_loss
from jaxllm.inference.sampling import Sampler
from jaxllm.language_model import LanguageModel, of_run
from jaxllm.locate import is_huggingface, locate, look
from jaxllm.models import accounting
from jaxllm.models.build import AnyConfig, attention_kernel, init_params
from jaxllm.models.config import ModelConfig, is_vae
from jaxllm.models.encoder_config import Classes, Embeddings, EncoderConfig, MaskedLM
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.planning.aot import Job, on_mesh
from jaxllm.planning.memory import expected
from jaxllm.recipe import Recipe, load_recipe
from jaxllm.sharding.mesh import reader
from jaxllm.training.checkpoint import load_params
from jaxllm.training.feed import place
from jaxllm.training.loop import Action, Diverged
from jaxllm.training.metrics import read
from jaxllm.training.objectives import eval_metrics, eval_step
from jaxllm.training.optim import optimizer
from jaxllm.training.run_log import Position, RunLog
from jaxllm.training.schedules import warmup_steps
from jaxllm.training.state import TrainState, init_state, param_shardings
from jaxllm.training.tiers import Tiers
from jaxllm.vae import VAE

# Of a process on a CPU at most, as measured (docs/results.md): bytes of Python, JAX and compiled programs, and a
# multiple of the estimate, with what glibc keeps of freed memory and without.
PROCESS_BYTES, KEPT, IN_USE = 0.6e9, 4, 2
SAID = ("imported", "stop_ids", "forced", "asked")  # the last two: how an encoder-decoder writes targets


class Run:
    """One run in this process.

    Attributes:
      begin: where this process begins; known after `start`.
      kernel: what computes attention.
      meet: waits for all processes, once for each name: before what is compiled at its first use has collectives.
    Raises:
      ValueError: a prompt, the data or the kernel cannot be used.
    """

    def __init__(self, recipe: Recipe, loader: Loader, mesh: Mesh):
        self.recipe, self.loader, self.mesh = recipe, loader, mesh
        self.run_dir = here(recipe.out)
        if is_vae(recipe.model) and (chats := [each for each in loader.datasets if each.kind == "chat"]):
            raise ValueError(
                f"model.latent learns whole texts, and {chats[0].directory} has conversations; prepare it as text"
            )
        self.compute = recipe.compute.resolve(jax.default_backend(), recipe.model.n_layers)
        platform, shared = mesh.devices.flat[0].platform, mesh.shape["context"]
        self.kernel = attention_kernel(recipe.model, self.compute, platform, recipe.data.packing.seq_len, shared)
        self.tokens_per_step = recipe.data.batch_size * recipe.data.packing.seq_len
        self.begin = Position(0, 0, recipe.data.batch_size)
        self.val_loss: float | None = None  # the last one measured
        self.meet: Callable[[str], None] = lambda name: None
        self._said: dict[str, Any] = {}  # by the model that this one starts from, see `SAID`
        if recipe.monitor.prompts:
            self._check_prompts()
        manifests = {source.path: read_manifest(source.path) for source in recipe.data.sources if source.validate_on}
        splits = {path: manifest.splits.get("validation") for path, manifest in manifests.items()}
        self._held_out = [path for path, split in splits.items() if split is not None and split.n_documents]
        self._validation = Loader(recipe.data, "validation", *reader(mesh)) if self._held_out else None
        texts = {} if self._validation is None else {"texts_per_row": self._validation.texts_per_row}
        step = functools.partial(eval_step, model=recipe.model, compute=self.compute, **texts)
        self._eval = jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))  # each process reads it
        self._compiled_eval: Callable[[Any, Any], dict[str, Any]] | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the run learns to answer (its first source holds conversations)."""
        return self.loader.datasets[0].kind == "chat"

    def _check_prompts(self) -> None:
        """Refuse prompts that leave no room for an answer: now, and not when the first samples are due."""
        model, tokenizer = self.recipe.model, tokenizers.load(self.loader.tokenizer_dir)
        longest = model.max_seq_len
        if not isinstance(model, ModelConfig):
            _check_sources(of_run(model, {}, self.loader.tokenizer_dir, {}), self.recipe.monitor.prompts)
            return
        for number, prompt in enumerate(self.recipe.monitor.prompts):
            if self.is_chat:  # no VAE
                asked = [{"role": "user", "content": prompt}]
                length = len(encode_chat(tokenizer, asked, add_generation_prompt=True)[0])
            else:
                length = (1 if is_vae(model) else len(tokenizer.prefix)) + len(tokenizer.encode(prompt))
            if not 0 < length < longest:
                raise ValueError(
                    f"monitor.prompts.{number} has {length} tokens; with room for an answer, model.max_seq_len="
                    f"{longest} takes 1 to {longest - 1}: {prompt[:60]!r}"
                )

    def start(self, checkpoints: Tiers) -> TrainState:
        """Return the state to go on from: restored if there is a checkpoint, else new."""
        recipe, self.checkpoints = self.recipe, checkpoints
        resumes, params = checkpoints.resumes, None
        if recipe.start_from is not None and not resumes:
            params = self._starting_params()
        state, self.shardings = init_state(
            recipe.model, optimizer(recipe.optim), self.mesh, seed=recipe.seed,
            ema=recipe.step.ema_decay is not None, params=params, offload=recipe.step.offload,
        )  # fmt: skip
        if resumes:
            abstract = jax.eval_shape(lambda: state)
            del state  # or two states would be in memory
            try:
                state, meta = checkpoints.restore(abstract, self.shardings, self._fingerprints())
            except ValueError as error:
                if not checkpoints.resumes:  # nothing but the fast tier, and that of no use
                    return self.start(checkpoints)
                before, now = (each.data.model_dump() for each in (load_recipe(self.run_dir), recipe))
                changed = [f"data.{key}" for key in ("sources", "packing", "seed") if before[key] != now[key]]
                hint = f" (not as in its recipe: {', '.join(changed)})" if changed else ""
                raise ValueError(f"{error}{hint}") from error
            self.begin = self.begin._replace(step=int(state.step), sample=meta["sample"])
            self.val_loss, self._said = meta.get("val_loss"), {name: meta[name] for name in SAID if name in meta}
        return state

    def _starting_params(self) -> Any:
        """Read the parameters of `start_from` straight into their places on the mesh."""
        source, wanted = self.recipe.start_from, self.recipe.model
        found, opened = look(source, encoders=True)
        run_dir, step = (here(source), None) if is_huggingface(source) else locate(source)
        if not _goes_on(found, wanted):
            raise ValueError(f"`model` differs from the model of start_from={source}; leave `model` out of the recipe")
        if tokenizers.load(run_dir).fingerprint != self.loader.tokenizer_fingerprint:
            raise ValueError(
                f"start_from={source} has another tokenizer than {self.recipe.data.sources[0].path}; prepare the data "
                f"with --tokenizer {run_dir}"
            )
        if is_huggingface(source):
            from jaxllm import huggingface

            model = huggingface.load(opened, mesh=self.mesh, dtype="float32")
            params, meta = model.params, vars(model)
        else:
            params, meta = load_params(run_dir, found, step=step, shardings=param_shardings(found, self.mesh))
        names = SAID if isinstance(wanted, Seq2SeqConfig) else SAID[:2]
        self._said = {name: meta[name] for name in names if name in meta}
        if isinstance(wanted, EncoderConfig) and wanted.head != found.head:  # a new one on top of what reads
            fresh = jax.jit(init_params, static_argnums=(0, 1), out_shardings=param_shardings(wanted, self.mesh))
            head = fresh(wanted, self.recipe.seed)["head"]
            if isinstance(found.head, Embeddings) and isinstance(wanted.head, Classes) and found.head.pooler:
                head["pooler"] = params["head"]
            params = {**params, "head": head}
        return params

    def _fingerprints(self) -> dict[str, str]:
        """What a resumed run may not change because its state, or its place in the data, would mean something else."""
        ema = self.recipe.step.ema_decay is not None
        return {
            "tokenizer": self.loader.tokenizer_fingerprint, "data": self.loader.fingerprint,
            "optim.kind": self.recipe.optim.kind, "optim.moments": self.recipe.optim.moments,
            "step.ema_decay": "a moving average" if ema else "none",
        }  # fmt: skip

    def actions(self, log: RunLog) -> list[Action]:
        """Return what is due between steps, in order: the checkpoint last, so that it covers the others' lines."""
        self.log, monitor = log, self.recipe.monitor
        actions = []
        if self._validation is not None:
            actions.append(Action(monitor.evaluate_every, self.evaluate, "evaluate"))
        else:
            log.say("no validation split: the data has no held-out documents, so no validation loss is measured")
        if monitor.prompts:
            actions.append(Action(monitor.sample_every, self.write_samples, "sample"))
        every, fast = self.recipe.checkpoint.every, self.recipe.checkpoint.fast
        if fast.directory is not None:
            actions.append(Action(fast.every, functools.partial(self.save, fast=True)))
        return [*actions, Action(every, self.save)]

    def catch_up(self, actions: list[Action], state: TrainState, steps: int) -> None:
        """Evaluate and sample at the step of the checkpoint, where a stop had no time for it."""
        step = self.begin.step
        metrics, samples = (read(self.run_dir / f"{name}.jsonl") for name in ("metrics", "samples"))
        evaluated = any("val_loss" in record and record["step"] == step for record in metrics)
        sampled = any(record["step"] == step for record in samples)
        done = [*[self.evaluate] * evaluated, *[self.write_samples] * sampled]
        for action in actions:
            if step and action.phase != "save" and action.due(step, steps) and action.run not in done:
                action.run(step, state)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Measure the validation loss over the whole split (or `monitor.evaluate_batches` batches of it)."""
        validation, model, params = self._validation, self.recipe.model, _best_params(state)
        validation.set_state({"sample": 0})

        def sums(local: AnyBatch) -> dict[str, Any]:
            batch = place(local, self.mesh)
            if self._compiled_eval is None:
                self._compiled_eval = self._eval.lower(params, batch).compile()
                self.meet("evaluate")
            return self._compiled_eval(params, batch)

        most = self.recipe.monitor.evaluate_batches
        found, all_sums = evaluate_loss(validation, sums, validation.bytes_per_token, most)
        values = {"val_loss": found.nats_per_token}
        more = {f"val_{name}": value for name, value in eval_metrics(all_sums, model).items()}
        if isinstance(model, EncoderConfig):  # which tells a few tokens, or labels, and not the text
            values["val_accuracy"] = more["val_accuracy"]
        else:
            values |= {"val_bits_per_byte": found.bits_per_byte, **more}
        self.val_loss = found.nats_per_token
        self.log.evaluation(step, values)

    def write_samples(self, step: int, state: TrainState) -> None:
        """Write down what the model answers to `monitor.prompts` now."""
        parts = self.recipe.model, _best_params(state), self.loader.tokenizer_dir
        model = of_run(*parts, {"chat": self.is_chat, **self._said}, compute=self.recipe.compute.elsewhere())
        self.meet("sample")
        for prompt in self.recipe.monitor.prompts:
            self.log.sample(step, prompt, _said(model, prompt, self.recipe.monitor.sample_tokens))

    def documents(self, step: int) -> Iterator[dict[str, Any]]:
        """Yield what update `step` learned from: of each document in its rows the place and the text in the row."""
        tokenizer = tokenizers.load(self.loader.tokenizer_dir)
        for sample in range(self.begin.at(step - 1), min(self.begin.at(step), self.loader.n_samples or sys.maxsize)):
            source, row = self.loader.locate(sample)
            plan = self.loader.plans[source]
            for segment in segments(plan, row, tokenizer, self.loader.row(sample)):
                text = "".join(token.text for token in segment.tokens)
                yield {
                    "sample": sample, "dataset": named(plan.dataset.directory), "document": segment.document,
                    **segment.origin, "tokens": segment.n_tokens, "text": text,
                }  # fmt: skip

    def save(self, step: int, state: TrainState, fast: bool = False) -> None:
        """Start writing a checkpoint; the lines that it covers are on disk, and in the bucket, before it is."""
        if jax.process_index() == 0:
            push(self.run_dir)
        # The last batch of an epoch's worth of data may be filled up with nothing.
        sample = min(self.begin.at(step), self.loader.n_samples or self.begin.at(step))
        meta = {
            "step": step, "sample": sample, "fingerprints": self._fingerprints(), "chat": self.is_chat,
            "val_loss": self.val_loss, **self._said,
        }  # fmt: skip
        (self.checkpoints.fast if fast else self.checkpoints).save(state, meta, None if fast else self.val_loss)

    def save_once(self, step: int, state: TrainState) -> None:
        """Have a whole checkpoint of `step` on disk."""
        self.checkpoints.wait()
        if step not in self.checkpoints.steps():
            self.save(step, state)
            self.checkpoints.wait()

    def rescue(self, step: int, state: TrainState, error: Exception) -> None:
        """Save what was computed before the error that ends the run."""
        everywhere = isinstance(error, Diverged | DataExhausted)  # a file that one process cannot read, the others can
        if step > self.begin.step and (everywhere or jax.process_count() == 1):
            self.save_once(step, state)
            self.log.say(f"saved step {step}")

    def flops_per_step(self) -> tuple[float, float | None]:
        """Return (model FLOPs of a step, peak FLOP/s of all devices or None)."""
        peak = accounting.peak_flops(jax.devices()[0].device_kind)
        per_token = accounting.flops_per_token(self.recipe.model, self.recipe.data.packing.seq_len)
        return per_token * self.tokens_per_step, None if peak is None else peak * jax.device_count()

    def efficiency(self) -> Iterator[str]:
        """Say what MFU means here, where the peak of a device is known, and what a CPU does not do."""
        flops, peak = self.flops_per_step()
        if peak is not None:
            yield (
                f"MFU = {flops:.3g} model FLOPs of a step (6 N + attention, nothing recomputed; PaLM, appendix B) / "
                f"seconds / {peak / 1e12:,.0f} TFLOP/s, the dense bfloat16 peak of all {jax.device_count()} devices"
            )
        moved = {"step.offload": self.recipe.step.offload, "compute.remat=offload": self.compute.remat == "offload"}
        keys = [key for key, on in moved.items() if on]
        if keys and jax.default_backend() == "cpu":
            yield f"note: {' and '.join(keys)}: the memory of a CPU is the host's, so that nothing is saved here"

    def memory(self) -> tuple[str, float]:
        """Estimate what lies on a device, in words and in bytes."""
        recipe = self.recipe
        parts = recipe.model, recipe.compute, recipe.optim, recipe.step, recipe.mesh
        job = Job(*parts, recipe.data.batch_size, recipe.data.packing.seq_len)
        sizes = expected(job, on_mesh(job, self.mesh), jax.default_backend())
        needed = sum(sizes.values())
        return f"memory per device, estimated: {accounting.memory_line(sizes)}{self._held(needed)}", needed

    def _held(self, needed: float) -> str:
        """Say what a process on a CPU may hold, of which `needed` bytes per device are only a part."""
        if jax.default_backend() != "cpu":
            return ""
        most, least = (PROCESS_BYTES + factor * needed * jax.local_device_count() for factor in (KEPT, IN_USE))
        if not self.recipe.platform.keep_memory:
            return f"; this process may hold {least / 1e9:.1f} GB"
        return f"; this process may hold {most / 1e9:.1f} GB, {least / 1e9:.1f} GB with platform.keep_memory=false"

    def describe(self, steps: int) -> str:
        """Say in a line what is about to happen."""
        data, done = self.recipe.data, self.begin.step
        total, active = accounting.param_count(self.recipe.model), accounting.active_param_count(self.recipe.model)
        kind = jax.devices()[0].device_kind
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1) or "one device"
        samples = min(self.begin.at(steps), self.loader.n_samples or self.begin.at(steps))  # the last may be filled up
        other = abs(self.begin.sample - done * data.batch_size) >= data.batch_size  # what was done, in another size
        return (
            f"{short(total)} parameters{f' ({short(active)} of them active)' * (active < total)}, "
            f"{self.tokens_per_step:,} positions/step{f' from step {done} on' * other}, {count(steps, 'step')} = "
            f"{short(samples * data.packing.seq_len)} positions = "
            f"{samples / self.loader.samples_per_epoch:.1f} epochs; {kind} ({mesh}), {self.compute.dtype}"
            + (f"; resuming at step {done}" if done else "")
        )

    def notes(self, steps: int) -> Iterator[str]:
        """Say what is left out, what the losses are of, and if a batch or the warm-up is long for a run of `steps`."""
        sources, rows, batch = self.recipe.data.sources, self.loader.samples_per_epoch, self.recipe.data.batch_size
        yield from self.loader.notes()
        if self._held_out and len(sources) > 1:
            yield (
                f"note: training and validation loss are of different mixtures: of all {len(sources)} sources by their "
                f"weights, and of the held-out documents of {' and '.join(self._held_out)}"
            )
        if len(sources) > 1:
            passes = self.loader.passes(samples := min(self.begin.at(steps), self.loader.n_samples or sys.maxsize))
            each = ", ".join(f"{source.path} {number:.2g}" for source, number in zip(sources, passes, strict=True))
            yield f"note: passes over the sources in {samples:,} samples: {each}"
        if rows < batch:
            yield (
                f"note: an epoch has {count(rows, 'sample')}, fewer than data.batch_size={batch}: one step takes more "
                "than an epoch, and a length in epochs or tokens is rounded up to whole steps; lower data.batch_size "
                f"to {rows} or less to train just as long as you asked"
            )
        schedule = self.recipe.optim.schedule
        if 2 * (rise := warmup_steps(schedule, steps)) > steps > max(1, self.begin.step):
            yield (
                f"note: the learning rate rises over {'all ' if rise == steps else f'{rise:g} of the '}{steps} steps "
                f"(optim.schedule.warmup={schedule.warmup:g}); 0.05, which is a share of them, leaves time for its fall"
            )


def _goes_on(found: AnyConfig, wanted: AnyConfig) -> bool:
    """Whether the parameters of one model, all but the head of an encoder, can be those of another."""
    if type(found) is not type(wanted):
        return False
    match wanted:
        case ModelConfig():
            return wanted.model_copy(update={"max_seq_len": found.max_seq_len}) == found
        case EncoderConfig():
            return wanted.model_copy(update={"head": found.head}) == found
    return wanted == found


def _check_sources(model: Encoder | EncoderDecoder, prompts: Sequence[str]) -> None:
    """Refuse prompts that are too long, or do not have the one mask that is to be filled."""
    encoder = isinstance(model, Encoder)
    longest = model.config.max_seq_len if encoder else model.config.encoder.max_seq_len
    fills = encoder and isinstance(model.config.head, MaskedLM)
    for number, prompt in enumerate(prompts):
        [(ids, _)] = model.tokenizer.encode([prompt], longest, truncate=True, special=fills)
        if len(ids) == longest:
            raise ValueError(f"monitor.prompts.{number} is longer than the {longest} tokens of model.max_seq_len")
        if fills and ids.count(model.tokenizer.mask_id) != 1:
            raise ValueError(
                f"monitor.prompts.{number} must have {model.tokenizer.mask} once, for what is to be guessed: {prompt!r}"
            )


def _said(model: LanguageModel | Encoder | EncoderDecoder | VAE, prompt: str, length: int) -> str:
    """Return what a model makes of a prompt, in at most `length` tokens."""
    match model:
        case Encoder() if isinstance(model.config.head, MaskedLM):
            return ", ".join(f"{each.token} {each.probability:.2f}" for each in model.fill(prompt))
        case Encoder():
            [found] = model.classify(prompt)
            return f"{found.label} {found.probability:.2f}"
        case EncoderDecoder():
            return model.generate(prompt, max_new_tokens=length)[0].text
        case VAE():
            return model.decode(model.encode(prompt).mean, max_new_tokens=length)[0]
    return model.respond(prompt, max_new_tokens=length, sampler=Sampler(temperature=0.0)).text


def _best_params(state: TrainState) -> Any:
    """Return the parameters that evaluation and users get: the moving average where one is kept."""
    return state.params if state.ema is None else state.ema
