from setuptools import find_packages, setup

setup(
    name='il_policies',
    version='0.1.0',
    description='Imitation-learning policies for robot arms: data, training, evaluation, the il command',
    license='Apache-2.0',
    packages=find_packages(),
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/il_policies']),
        ('share/il_policies', ['package.xml']),
    ],
    entry_points={'console_scripts': ['il = il_policies.cli:main']},
    zip_safe=True,
)
