"""OpenAI-style HTTP over one engine: one model, one worker, answers in the order of arrival."""
