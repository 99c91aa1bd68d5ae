"""What the keys of NeMo's sections mean that conf/base.yaml and conf/model/policy.yaml set or this package reads."""

from __future__ import annotations

SECTIONS: dict[str, str] = {
    "model": "The policy and its layout, NeMo's section; it overrides the config in the .nemo checkpoint. Listed are "
    "the keys that conf/model/policy.yaml sets or this package reads; NeMo has more.",
    "trainer": "Lightning's trainer, NeMo's section. Listed are the keys that conf/base.yaml sets or this package "
    "reads; NeMo has more.",
    "exp_manager": "Loggers and checkpoints, NeMo's section. Listed are the keys that conf/base.yaml sets or this "
    "package reads; NeMo has more.",
}
"""Section -> its meaning."""

KEYS: dict[str, str] = {
    "model.precision": "Precision of the policy; follows `trainer.precision`.",
    "model.seed": "Seed of fresh weights and of the order of prompts; NeMo requires a value above 0.",
    "model.mcore_gpt": "Must be true: the policy is a Megatron-core GPT.",
    "model.megatron_amp_O2": "Whether weights are held in bf16, with float32 copies in the optimizer.",
    "model.tensor_model_parallel_size": "Ranks that share each layer.",
    "model.pipeline_model_parallel_size": "Pipeline stages that share the layers.",
    "model.virtual_pipeline_model_parallel_size": "Must be null or 1: NeMo cannot generate with virtual stages.",
    "model.context_parallel_size": "Ranks that share each sequence.",
    "model.expert_model_parallel_size": "Ranks that share the experts of a mixture.",
    "model.sequence_parallel": "Whether tensor-parallel ranks share sequences between layers. A mixture of experts "
    "with tensor parallelism needs it.",
    "model.gradient_as_bucket_view": "Whether gradients are views of the reduction buffers.",
    "model.expert_tensor_parallel_size": "Ranks that share each expert; null: as `tensor_model_parallel_size`.",
    "model.num_moe_experts": "Experts of a mixture; null for a dense policy. Usually the checkpoint has it.",
    "model.moe_token_dispatcher_type": "allgather or alltoall. With several experts per rank and tensor parallelism "
    "only allgather is correct in megatron-core 0.11.0.",
    "model.encoder_seq_length": "Longest sequence, prompt and response together.",
    "model.override_vocab_size": "Rows of the embedding; null: those of the tokenizer, padded.",
    "model.transformer_engine": "Whether to use the layers of Transformer Engine. Must be false on a CPU.",
    "model.logprobs": "chunked, logits or auto: whether log-probs are computed from hidden states, block by block of "
    "the vocabulary, or from all logits. auto is chunked if the float32 logits of a micro-batch would take 1 GiB or "
    "more on a rank. Both agree to rounding; see docs/performance.md.",
    "model.tokenizer": "NeMo's tokenizer; must be the policy's own.",
    "model.micro_batch_size": "Samples per forward and backward pass on a data-parallel rank.",
    "model.global_batch_size": "Samples per optimizer step over all ranks; follows from `algorithm`.",
    "model.hidden_dropout": "Must be 0: the forward passes of an optimizer step must be the same function.",
    "model.attention_dropout": "Must be 0, for the same reason.",
    "model.ffn_dropout": "Must be 0, for the same reason.",
    "model.ppo.offload_adam_states": "Must be false.",
    "model.ppo.entropy_bonus": "Must be 0.",
    "model.ppo.ratio_eps": "Must be 0: the hierarchy or `algorithm.gating` clips.",
    "model.ppo.rollout_micro_batch_size": "Samples per batch of generation, a multiple of "
    "`algorithm.samples_per_prompt`.",
    "model.ppo.forward_micro_batch_size": "Samples per forward pass for the old policy's log-probs.",
    "model.ppo.sampling_params": "Responses must be samples of the policy itself. Only `add_BOS` and `end_strings` may "
    "be changed.",
    "model.ppo.sampling_params.add_BOS": "Whether every `prompt` begins with the tokenizer's first token (BOS). "
    "Chat `messages` begin as the chat template writes them.",
    "model.ppo.sampling_params.end_strings": "Strings that end a response.",
    "model.ppo.length_params.max_length": "Longest response, in tokens, including the end-of-sequence token.",
    "model.ppo.length_params.min_length": "Must be 0.",
    "model.peft": "NeMo's parameter-efficient fine-tuning: `peft_scheme` is none, or lora on a GPU.",
    "model.data": "Read by NeMo's GPT while it is built; prompts come from `data`.",
    "model.optim.name": "Must be mcore_distributed_optim, whose gradient scale the exact step knows.",
    "model.optim.lr": "Learning rate.",
    "model.optim.weight_decay": "Weight decay.",
    "model.optim.betas": "Adam's betas.",
    "model.optim.check_for_nan_in_grad": "Megatron's check on one rank. Leave it false: a gradient norm that "
    "is not finite ends the run on all ranks.",
    "model.optim.sched": "Learning-rate schedule of NeMo; its horizon is `trainer.max_steps`.",
    "trainer.num_nodes": "Number of nodes.",
    "trainer.devices": "Ranks per node; by default those that the launcher started.",
    "trainer.accelerator": "gpu, or cpu with `cpu: true`.",
    "trainer.precision": "bf16, bf16-mixed or 32. float16 is not supported: the exact step has no loss scale.",
    "trainer.gradient_clip_val": "Norm to which the optimizer clips gradients; 0 for no clipping.",
    "trainer.max_time": "Must be null: it would stop Lightning's own loop, which does not run. Set "
    "`exp_manager.max_time_per_run`.",
    "trainer.max_steps": "Horizon of the learning-rate schedule, in optimizer steps; -1: all that the prompts allow.",
    "trainer.max_epochs": "Follows from `algorithm.data_epochs`.",
    "trainer.logger": "Leave it false: `exp_manager` creates the loggers.",
    "trainer.enable_checkpointing": "Leave it false: `exp_manager` creates the checkpoints.",
    "trainer.use_distributed_sampler": "Leave it false: prompts are dealt to ranks by whole prompt groups.",
    "trainer.enable_progress_bar": "Lightning's progress bar, which this loop does not use.",
    "trainer.ppo": "Follows from `algorithm` and `model`; change it there.",
    "exp_manager.explicit_log_dir": "Folder of checkpoints, TensorBoard and logs. The experiment manager moves other "
    "files out of it.",
    "exp_manager.exp_dir": "Leave it null: `explicit_log_dir` names the folder.",
    "exp_manager.name": "Name of the run for loggers.",
    "exp_manager.log_tflops_per_sec_per_gpu": "Leave it false: NeMo counts in Lightning's loop, which does not run.",
    "exp_manager.log_step_timing": "Leave it false, for the same reason.",
    "exp_manager.create_tensorboard_logger": "Whether metrics go to TensorBoard, beside `metrics.jsonl`.",
    "exp_manager.create_wandb_logger": "Whether metrics go to Weights & Biases; follows from `wandb`.",
    "exp_manager.wandb_logger_kwargs": "Options of the Weights & Biases logger, such as its project.",
    "exp_manager.resume_if_exists": "Whether a run resumes from its newest whole checkpoint; false refuses a "
    "`run_dir` that has checkpoints.",
    "exp_manager.create_checkpoint_callback": "Whether checkpoints are written.",
    "exp_manager.max_time_per_run": "Time limit, dd:hh:mm:ss. The run saves a checkpoint before it, and exits "
    "with status 75.",
    "exp_manager.checkpoint_callback_params.monitor": "What decides which checkpoints are kept; `step`: the newest.",
    "exp_manager.checkpoint_callback_params.mode": "`max`: the checkpoints with the largest `monitor` are kept.",
    "exp_manager.checkpoint_callback_params.save_top_k": "How many checkpoints are kept.",
    "exp_manager.checkpoint_callback_params.save_last": "Whether the newest is saved twice. Required only for a "
    "`monitor` other than `step`.",
    "exp_manager.checkpoint_callback_params.always_save_nemo": "Whether every checkpoint is also written as a .nemo "
    "file.",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": "Whether the trained policy is written as a .nemo "
    "file.",
    "exp_manager.checkpoint_callback_params.filename": "Names of checkpoints.",
    "exp_manager.checkpoint_callback_params.model_parallel_size": "Follows from `model`.",
}
"""Key -> its meaning here."""
