package guest

import (
	"os/exec"
	"runtime"
	"syscall"
)

// dieWithUs has the kernel kill the command if this process ends without
// having done so. The signal is sent when the thread that started the command
// ends, so that is kept until release.
func dieWithUs(cmd *exec.Cmd) (release func()) {
	runtime.LockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return runtime.UnlockOSThread
}
