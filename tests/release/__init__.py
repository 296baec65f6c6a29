"""What is built, shipped and promised to users: the wheel, the first hour with it, the files of the repository."""
