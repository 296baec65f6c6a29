from tests.data.conftest import own_cache, tokenizer, write

__all__ = ["own_cache", "tokenizer", "write"]
