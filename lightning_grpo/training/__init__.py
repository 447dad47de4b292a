"""What an optimizer step needs: rollouts with their scores, their cut into micro-batches, and where training stands."""
