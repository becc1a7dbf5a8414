package main

import (
	"context"
	"fmt"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

var franzCodecs = map[string]kgo.CompressionCodec{
	"none":   kgo.NoCompression(),
	"gzip":   kgo.GzipCompression(),
	"snappy": kgo.SnappyCompression(),
	"lz4":    kgo.Lz4Compression(),
	"zstd":   kgo.ZstdCompression(),
}

func franz(brokers []string, topic string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	client, err := kgo.NewClient(kgo.SeedBrokers(brokers...))
	if err != nil {
		return err
	}
	defer client.Close()
	admin := kadm.NewClient(client)
	if _, err := admin.CreateTopic(ctx, 2, 1, nil, topic); err != nil {
		return err
	}
	err = until("the topic has an id", func() (bool, error) {
		topics, err := admin.ListTopics(ctx, topic)
		return topics[topic].ID != (kadm.TopicID{}), err
	})
	if err != nil {
		return err
	}
	for turn := range 2 {
		if err := franzTurn(ctx, brokers, topic, turn); err != nil {
			return err
		}
	}
	return franzAdmin(ctx, admin, topic)
}

func franzTurn(ctx context.Context, brokers []string, topic string, turn int) error {
	for _, codec := range codecs {
		producer, err := kgo.NewClient(kgo.SeedBrokers(brokers...), kgo.ProducerBatchCompression(franzCodecs[codec]))
		if err != nil {
			return err
		}
		var records []*kgo.Record
		for _, value := range values(turn, codec) {
			records = append(records, &kgo.Record{Topic: topic, Key: []byte(value), Value: []byte(value)})
		}
		err = producer.ProduceSync(ctx, records...).FirstErr()
		producer.Close()
		if err != nil {
			return err
		}
	}
	consumer, err := kgo.NewClient(
		kgo.SeedBrokers(brokers...),
		kgo.ConsumerGroup(topic),
		kgo.ConsumeTopics(topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.DisableAutoCommit(),
	)
	if err != nil {
		return err
	}
	defer consumer.Close()
	var seen []string
	for len(seen) < len(all(turn)) {
		fetches := consumer.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			return err
		}
		fetches.EachRecord(func(record *kgo.Record) { seen = append(seen, string(record.Value)) })
	}
	return first(same(seen, all(turn)), consumer.CommitUncommittedOffsets(ctx))
}

func franzAdmin(ctx context.Context, admin *kadm.Client, topic string) error {
	value := "77777"
	change := []kadm.AlterConfig{{Op: kadm.SetConfig, Name: "retention.ms", Value: &value}}
	if _, err := admin.AlterTopicConfigs(ctx, change, topic); err != nil {
		return err
	}
	err := until("the configuration is told", func() (bool, error) {
		configs, err := admin.DescribeTopicConfigs(ctx, topic)
		found := false
		for _, of := range configs {
			for _, config := range of.Configs {
				found = found || config.Key == "retention.ms" && config.MaybeValue() == value
			}
		}
		return found, err
	})
	if err != nil {
		return err
	}
	newest, err := admin.ListMaxTimestampOffsets(ctx, topic)
	if err = first(err, newest.Error()); err != nil {
		return err
	}
	dirs, err := admin.DescribeAllLogDirs(ctx, nil)
	if err != nil {
		return err
	}
	if len(dirs) != 1 {
		return fmt.Errorf("folders of %d brokers", len(dirs))
	}
	lags, err := admin.Lag(ctx, topic)
	if err = first(err, lags.Error()); err != nil {
		return err
	}
	groups, err := admin.ListGroups(ctx, "Empty")
	if err != nil {
		return err
	}
	if _, listed := groups[topic]; !listed {
		return fmt.Errorf("the group is not listed: %v", groups.Groups())
	}
	var offsets kadm.TopicsSet
	offsets.Add(topic, 0)
	deleted, err := admin.DeleteOffsets(ctx, topic, offsets)
	if err = first(err, deleted.Error()); err != nil {
		return err
	}
	if _, err := admin.DeleteGroups(ctx, topic); err != nil {
		return err
	}
	_, err = admin.DeleteTopics(ctx, topic)
	return err
}
