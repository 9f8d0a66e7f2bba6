"""What hardware will give: memory, steps and loads by cost models, and the scheduler on a simulated clock."""
