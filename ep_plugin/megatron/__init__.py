"""The edge: Megatron builds our block where it would build its own. `install()` is the interface.

Seams, each an attribute that Megatron looks up when it is called, and why it is this one (the last
five only for a Megatron from its wheel, and over torch's Adam):

    moe_module_specs:MoELayer
        every MoE layer's spec is made of this name
    transformer_config:TransformerConfig.__post_init__
        an activation has to be set before this derives others from it; --ep-dense-activation
    argument_utils:gpt_config_from_args
        it takes --use-rope-scaling along and leaves --rope-scaling-factor at 8
    module:MegatronModule.set_is_first_microbatch
        Megatron's schedules call it when a step begins, which is when e4m3 weights are made anew
    cuda_graphs:TECudaGraphHelper.create_cudagraphs
        layers are captured here, with tokens of no meaning, which our routers would count
    cuda_graphs:TECudaGraphHelper._get_cuda_graph_input_data
        how layers are captured is decided here, copies of the gradients that come back included
    optimizer:ChainedOptimizer.load_state_dict
        here Megatron refuses the state of another number of optimizers
    finalize_model_grads:_update_router_expert_bias
        Megatron stacks all biases here, which needs layers of one size
    moe_layer:MoELayer.__init__
        a spec may hold Megatron's class since before the plugin; asked when a layer is built
    moe_layer:BaseMoELayer.__init__
        every MoE layer comes by here, of a class of the script's too
    hybrid_model:HybridModel.__init__
        layers are built here, whose numbers are those of the pattern
    torch_fully_sharded_data_parallel:TorchFullyShardedDataParallel.__init__
        a loop of one's own may shard a model's parameters, which our experts do not bear
    megatron_fsdp:MegatronFSDP.__init__
        a loop of one's own may shard a model's parameters, which our experts do not bear
    mcore_fsdp_adapter:FullyShardedDataParallel.__init__
        a loop of one's own may shard a model's parameters, which our experts do not bear
    distributed_data_parallel:DistributedDataParallel.finish_grad_sync
        DDP has summed the gradients; copies of experts are summed next
    schedules:forward_step_calc_loss
        here the number of counted tokens is known, which auxiliary losses weigh by
    upcycling_utils:upcycle_state_dict
        it writes the names of Megatron's own experts; a model with ours is refused
    emerging_optimizers:TensorParallelMuon.orthogonalize
        Muon steps a matrix here; stacks of experts are several
    optimizer_config:ParamPredicate.__call__
        what is no matrix by its shape goes to Adam; stacks of experts are matrices
    layer_wise_optimizer:is_managed_by_layer_wise_optimizer
        the layer-wise optimizer finds its matrices by shape; stacks of experts join them
    optimizer:is_managed_by_layer_wise_optimizer
        the layer-wise optimizer finds its matrices by shape; stacks of experts join them
    arguments:add_megatron_arguments
        every parser of Megatron's loop is filled here; the --ep-* flags join
    arguments:validate_args
        every flag is parsed and nothing is built yet: a mistake ends the run here
    training:save_checkpoint
        a save that fails raises out of it
    training:maybe_finalize_async_save
        an asynchronous save that failed raises out of it
    training:save_checkpoint
        each save goes through it: the vocabulary's size goes along, --ep-audit-save reads back
    training:maybe_finalize_async_save
        only after it is an asynchronous save on disk, where --ep-audit-save can read it
    training:save_checkpoint
        every save goes through it, before anything is gathered or written; --ep-check-save
    training:maybe_finalize_async_save
        only after it is an asynchronous save on disk: the note of one that was not goes
    training:train
        buffers that hold inf before a step do so by design
    training:train_step
        one call is one step, with model, optimizer and gradients; --ep-parity-dump keeps them
    moe_logging:MoEMetricsTracker.report
        auxiliary losses are summed over ranks only here
    training:setup_model_and_optimizer
        a model that holds none of our blocks, or others, ends the run here
    training:setup_model_and_optimizer
        the model is built: Transformer Engine is asked which attention it will run
    initialize:_initialize_distributed
        ranks can tell each other where they are from here on
    training:train
        an exchange that fails in it says which rank is to blame
    training:train_step
        one call is one iteration
    rerun_state_machine:RerunDataIterator.__next__
        a rank waits for its data here
    training:save_checkpoint
        after a fault the sentence says that a rank was in it
    training:load_checkpoint
        after a fault the sentence says that a rank was in it
    training:evaluate
        after a fault the sentence says that a rank was in it
    optimizer:ChainedOptimizer.step
        after a fault the sentence says that a rank was in it
    optimizer:MixedPrecisionOptimizer.step
        after a fault the sentence says that a rank was in it
    optimizer:FP32Optimizer.step
        after a fault the sentence says that a rank was in it
    training:setup_model_and_optimizer
        the student is built and loaded: its teacher is loaded beside it; --ep-teacher
    training:train_step
        one call is one step: distilled until --ep-distill-stop, and logged
    training:training_log
        a loss that was once logged would be printed as 0 after the stop
    gpt_model:GPTModel.forward
        the teacher is given what the student is given
    language_module:LanguageModule.compute_language_model_loss
        here the student's logits are; the divergence joins the loss
    moe_logging:MoEMetricsTracker.report
        Megatron writes the losses of MoE layers here; the routers' metrics join them
    process:BaseProcess.start
        Megatron's save workers start through it, in every release; they end with their rank
    async_utils:PersistentAsyncCaller.close
        the standing save worker ends after it, and is not missed
    distributed:init_process_group
        arguments are validated and nobody has communicated: ranks compare them here
    parallel_state:initialize_model_parallel
        groups are made here; ranks whose process group was there already compare before
    training:get_megatron_optimizer
        the model is built and nothing loaded: ranks compare parameters and layers
    training:setup_model_and_optimizer
        a run without that optimizer compares its model here
    utils:compile_helpers
        it runs `make` where a wheel has no Makefile, and ends the process when that fails
    distrib_optimizer:DistributedOptimizer.state_dict
        it reads the step, which torch's Adam has only after its first update
    distrib_optimizer:DistributedOptimizer.load_state_dict
        it gives all parameters one shared step, which each update would count up for all
    distrib_optimizer:DistributedOptimizer._get_main_param_and_optimizer_states
        what it returns is saved as if it were as large as the parameter; a step is not
    distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states
        it asks a checkpoint for the step of each parameter, which is not saved there

`ep-plugin doctor -v` lists what is changed here, CPU mode included. Nothing is copied, no function
is replaced by a rewrite, and `uninstall()` puts each attribute back, unless somebody replaced it
after us. What differs between releases stands in `versions/`, one file each.
"""

from typing import TYPE_CHECKING

from ep_plugin.errors import ConfigError

if TYPE_CHECKING:
    from ep_plugin.megatron.settings import EdgeSettings

__all__ = ["install", "uninstall"]


def install(settings: "EdgeSettings | None" = None) -> None:
    """Install the plugin into Megatron; call it before `pretrain`. A second call does nothing.

    A training loop of your own over megatron-core, which parses no Megatron arguments, gives
    `settings` in place of the --ep-* flags.

    A Megatron we do not know is one sentence on rank 0 and exit code 2 on every rank.
    """
    from ep_plugin.megatron.seams import install
    from ep_plugin.megatron.seams.refusal import refuse

    try:
        install.install(settings)
    except ConfigError as error:
        refuse(error)


def uninstall() -> None:
    """Put back every attribute that `install` replaced, CPU mode included, if it did."""
    from ep_plugin.megatron.seams import install

    install.uninstall()
