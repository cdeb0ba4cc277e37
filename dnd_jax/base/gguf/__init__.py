"""A GGUF file (llama.cpp, Ollama) as a Hugging Face folder: keys as a configuration, tensors in
float32, tokens as a tokenizer; written once."""
