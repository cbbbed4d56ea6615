"""The eight benchmarks as lm-eval tasks, in four protocols that never share a table column.

Each group file holds the eight tasks: ``llm_adapters_generate_paper``, ``llm_adapters_generate_corrected``,
``llm_adapters_loglikelihood_paper`` and ``llm_adapters_loglikelihood_corrected``. ``commonsense_reasoning.evaluate``
runs them on a run's adapter; on any other model, the ``lm_eval`` command does, given the folder of prepared items::

    lm_eval --model hf --model_args pretrained=<model>,peft=<plain LoRA adapter> --batch_size 16 \\
        --include_path commonsense_reasoning/lm_eval_tasks --tasks llm_adapters_generate_corrected \\
        --metadata '{"data_dir": "data/commonsense_reasoning/small"}'

One exception: lm-eval's own stopping rule is wrong under beam search (it looks at as many hypotheses as there are
prompts, so that answers depend on the batch), which ``commonsense_reasoning.evaluate`` mends and the command cannot.
Numbers of ``llm_adapters_generate_paper`` should come from the former.
"""
