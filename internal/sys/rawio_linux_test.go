package sys

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestReadWriteNow(t *testing.T) {
	var p [2]int
	require.NoError(t, unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC))
	defer unix.Close(p[0])
	buf := make([]byte, 8)
	_, err := ReadNow(p[0], buf)
	assert.ErrorIs(t, err, unix.EAGAIN)
	n, err := WriteNow(p[1], []byte("text"))
	require.NoError(t, err)
	assert.Equal(t, 4, n)
	n, err = ReadNow(p[0], buf)
	require.NoError(t, err)
	assert.Equal(t, "text", string(buf[:n]))
	n, err = WriteNow(p[1], nil)
	require.NoError(t, err)
	assert.Zero(t, n)
	require.NoError(t, unix.Close(p[1]))
	_, err = WriteNow(p[1], []byte("x"))
	assert.ErrorIs(t, err, unix.EBADF)
}
