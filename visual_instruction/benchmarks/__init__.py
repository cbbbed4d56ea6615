"""Benchmarks: VLMEvalKit's files and questions, and scores that need no judge."""
