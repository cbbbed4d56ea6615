"""Converters: from published checkpoints to the base model folders of this experiment, without remote code.

    internlm2   InternLM2 -> Llama's layout
    projector   XTuner's or LLaVA's pretrained projector -> transformers' names
    llava-hf    a LLaVA of the hub -> base model folder
    assemble    language model + CLIP vision tower + projector -> base model folder

    python -m visual_instruction.convert COMMAND --help

A base model folder is transformers' layout of ``LlavaForConditionalGeneration`` with its processor. Tensors go from
file to file one by one, so that memory holds one shard of the output at a time.
"""
