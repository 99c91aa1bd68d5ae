"""Conversion of Hugging Face models of the Llama, Qwen2 and Mixtral families to `.nemo` policies, and back."""
