source /root/wt/env.sh constrain
job env -u MPLBACKEND timeout 400 python /work/shared/tools/nb.py run $1 $2 2>&1 | grep -v IPKernel | tail -12
