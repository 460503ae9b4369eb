package sys

import "structs"

// LoopInfo is struct loop_info64, include/uapi/linux/loop.h.
type LoopInfo struct {
	_              structs.HostLayout
	Device         uint64
	Inode          uint64
	RDevice        uint64
	Offset         uint64
	SizeLimit      uint64
	Number         uint32
	EncryptType    uint32
	EncryptKeySize uint32
	Flags          uint32
	FileName       [64]byte
	CryptName      [64]byte
	EncryptKey     [32]byte
	Init           [2]uint64
}

// LoopConfig is struct loop_config, Linux 5.8.
type LoopConfig struct {
	_         structs.HostLayout
	FD        uint32
	BlockSize uint32
	Info      LoopInfo
	_         [8]uint64
}
