"""Instructions that close a question, as LLaVA-1.5's training data and VLMEvalKit have them."""

MULTIPLE_CHOICE_SUFFIX = "Answer with the option's letter from the given choices directly."
SHORT_ANSWER_SUFFIX = "Answer the question using a single word or phrase."
