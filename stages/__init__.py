"""What is computed: corpus, teachers' notes, fusion, losses, the student's training."""
