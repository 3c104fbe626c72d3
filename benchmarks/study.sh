#!/usr/bin/env bash
# The sweeps behind docs/study.md, its tables and its figures. In: an installed deltascope, its environment active. Out:
# mlruns/, docs/study/ and docs/study.md. What is finished is skipped, so a run that was stopped goes on; all of it takes
# some ten hours on two cores. The parts do not depend on each other, except that the last two lines need them all.
set -euo pipefail
cd "$(dirname "$0")/.."

few=(evaluate.cards=0 evaluate.graphs=0 "evaluate.sets=[all]")
controls="evaluate.controls=[random_delta, shuffled_delta, dense_delta]"
strengths="evaluate.alphas=[-0.5, 0, 0.25, 0.5, 1, 2]"
more_strengths="evaluate.alphas=[-0.5, 0, 0.25, 0.5, 0.75, 1, 1.5, 2]"

# All linear layers, three seeds; Transcoder Adapters on the last of them.
python -m jobs sweep study --seeds 0
python -m jobs sweep study --seeds 1,2 "${few[@]}" "$controls"
python -m benchmarks.transcoder_adapters study name=study-s2 seed=2 --choice 10 --nudge 0.05 --csv docs/study/rival.csv

# Queries and values alone.
python -m jobs sweep study name=study-qv --seeds 0 lora.space.targets=q_proj,v_proj "${few[@]}" "$controls"

# All weights, without LoRA.
full=(study name=study-full-s0 data.eval_rows=20)
python -m jobs data "${full[@]}"
python -m benchmarks.full_finetune "${full[@]}" --out mlruns/full
python -m jobs sweep "${full[@]}" model.finetuned=mlruns/full "${few[@]}" "$controls" "$strengths"

# The other task.
python examples/pair/finetune.py mlruns/signature --rows 1500
python -m jobs sweep examples/pair/pair.yaml name=study-signature-s0 model.finetuned=mlruns/signature/adapter \
    data.rows_file=mlruns/signature/train.csv data.evaluation_file=mlruns/signature/held_out.csv \
    "deltas.d_new=[8, 128]" evaluate.groups=6 "${few[@]}" "$controls" "$more_strengths"

# Gemma, two seeds; the first one's figures again, with plain transformers.
make gemma
gemma=(gemma3_270m name=study-gemma lora.steps=60 lora.eval_every=30 activations.train_tokens=20000
    "deltas.d_new=[8, 128]" evaluate.cards=6 evaluate.groups=6)
python -m jobs sweep "${gemma[@]}" --seeds 0 "evaluate.controls=[random_delta, scaled_weights]"
python -m jobs sweep "${gemma[@]}" --seeds 1 "deltas.targets=[change]" evaluate.cards=0 evaluate.graphs=0 "$controls" \
    "$strengths"
python -m benchmarks.plain_knob study-gemma-s0 --csv docs/study/plain_knob.csv

# MLPs alone, three seeds; the reference study's deltas, and Transcoder Adapters, on the last of them.
mlps=(lora.space.targets=gate_proj,up_proj,down_proj "deltas.sites=[mlp]")
python -m jobs sweep study name=study-mlps --seeds 0,1 "${mlps[@]}"
python -m jobs sweep study name=study-mlps --seeds 2 "${mlps[@]}" "deltas.targets=[change, residual]"
python -m benchmarks.transcoder_adapters study name=study-mlps-s2 seed=2 "${mlps[@]}" \
    --choice 10 --nudge 0.02 --nudge 0.05 --csv docs/study/rival.csv

python -m benchmarks.study collect
python -m benchmarks.study write
