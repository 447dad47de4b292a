"""vLLM servers, in a child process or elsewhere, and how weights reach them."""
