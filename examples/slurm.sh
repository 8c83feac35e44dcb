#!/bin/bash
# Two machines of four GPUs each: sbatch examples/slurm.sh   (change the name; go on after an end of time is automatic)
#SBATCH --job-name=reviews
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# A minute before the time is up the state is saved and the job put back into the queue; the same command then goes on.
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append

source .venv/bin/activate
# srun begins one process a GPU; Lightning takes their number and addresses from SLURM.
# It no longer takes the cores from above by itself (since 22.05), and ends all when one of them has refused.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 python main.py fit \
  --config configs/experiment/imdb_10k.yaml --data.batch_size 256 \
  --name "reviews-$SLURM_JOB_ID" \
  --trainer.accelerator gpu --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
