package testenv

import (
	"bufio"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestProcesses(t *testing.T) {
	const mark = "testenv-process-mark"
	require.Empty(t, Processes(t, "\x00"+mark+"\x00"))
	cmd := exec.Command("cat", "--", "-", mark) // it reads what it is given, and does not come to the file
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	defer func() { _ = cmd.Wait() }()
	defer in.Close()
	require.Equal(t, []int{cmd.Process.Pid}, Processes(t, "\x00-\x00"+mark+"\x00"))

	resume := Stop(t, cmd.Process.Pid)
	answer := make(chan string, 1)
	go func() {
		s, _ := bufio.NewReader(out).ReadString('\n')
		answer <- s
	}()
	_, err = in.Write([]byte("hello\n"))
	require.NoError(t, err)
	select {
	case <-answer:
		t.Fatal("it runs")
	case <-time.After(20 * time.Millisecond):
	}
	resume()
	require.Equal(t, "hello\n", <-answer)
}
