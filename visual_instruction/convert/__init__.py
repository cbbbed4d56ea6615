"""Converters of checkpoints, without remote code and file to file: no converter builds a model with weights.

python -m visual_instruction.convert internlm2 SRC DST      InternLM2 -> Llama's layout
python -m visual_instruction.convert projector SRC DST      XTuner's or LLaVA's projector -> transformers' names
python -m visual_instruction.convert llava-hf SRC DST       a LLaVA of llava-hf -> base model folder, or its parts
python -m visual_instruction.convert assemble --llm LLM --vision CLIP [--projector PROJECTOR] DST
"""
