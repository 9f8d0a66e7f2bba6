"""Embeddings, classes, scores: OpenAI's route, vLLM's, and the rerankers' of Jina and Cohere."""
